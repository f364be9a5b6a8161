"""`load_checkpoint`: the right numbers in the right places, in every layout and type."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

import glm2_jax
from convert import load_checkpoint
from convert.layouts.names import INV_FREQ, PUBLISHED
from glm2_jax import CheckpointError, DeviceError, UsageError, make_mesh, parse_mesh
from glm2_jax.parts import parts_of
from tests.support.checkpoints import (
    TINY,
    official_tensors,
    random_params,
    tiny_config,
    write_official,
)
from tests.support.paths import ROOT

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
REFERENCE = ROOT.parent / "shared/data/reference"


def assert_equal(params, expected, dtype):
    """Every leaf has the shape of the model and the numbers of `expected`, rounded once."""
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for (path, found), (_, values) in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves_with_path(expected), strict=True
    ):
        assert isinstance(found, jax.Array) and found.dtype == np.dtype(dtype), path
        np.testing.assert_array_equal(np.asarray(found), values.astype(dtype), err_msg=str(path))


@pytest.mark.parametrize(
    ("kind", "shards", "dtype"),
    [("bin", 1, "float16"), ("bin", 5, "float32"), ("safetensors", 2, "bfloat16")],
)
def test_official_layouts(tmp_path, kind, shards, dtype):
    params = random_params(TINY)
    write_official(tmp_path, params=params, kind=kind, shards=shards, dtype=dtype)
    checkpoint = load_checkpoint(tmp_path, dtype=dtype)
    rounded = jax.tree.map(lambda array: array.astype(DTYPES[dtype]), params)
    assert_equal(checkpoint.params, rounded, DTYPES[dtype])
    assert (checkpoint.config, checkpoint.template, checkpoint.notes) == (TINY, "chatglm2", ())
    found = checkpoint.summary
    assert (found.layout, found.stored_dtype, found.dtype) == ("official", dtype, dtype)
    assert found.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))
    other = load_checkpoint(tmp_path, dtype="bf16" if dtype == "float32" else "fp32")
    if other.summary.dtype != dtype:
        says = f"the weights are stored in {dtype}; converted to {other.summary.dtype}"
        assert other.notes == (says,)


def test_rows_are_split_as_published():
    """q, k, v follow each other in query_key_value; gate comes before up."""
    rules = {rule.name.split("layers.{layer}.")[-1]: rule for rule in PUBLISHED}
    ranges = rules["self_attention.query_key_value.weight"].ranges(TINY)
    rows = [(part.path[1], start // 32, stop // 32) for part, start, stop in ranges]
    assert rows == [("q", 0, 32), ("k", 32, 48), ("v", 48, 64)]
    (gate_up,) = rules["mlp.dense_h_to_4h.weight"].parts
    assert gate_up.shape(TINY) == (2, 48, 32)


def test_the_table_agrees_with_the_model_and_the_published_index():
    shapes = glm2_jax.param_shapes(TINY)
    stacked = {part.path: part.shape(TINY) for part in parts_of(TINY)}
    for path, shape in jax.tree.leaves_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple)):
        keys = tuple(key.key for key in path)
        layers = (TINY.num_layers,) if keys[0] == "layers" else ()
        assert shape == layers + stacked.pop(keys)
    assert not stacked
    config = glm2_jax.PRESETS["chatglm2-6b"]
    rules = [(rule, layer) for rule in PUBLISHED for layer in rule.layers(config)]
    sizes = {rule.full_name(layer): rule.shape(config) for rule, layer in rules}
    assert len(sizes) == 199  # 200 with inv_freq
    assert sum(int(np.prod(shape)) for shape in sizes.values()) == 6_243_584_000
    name = "transformer.encoder.layers.27.self_attention.query_key_value.weight"
    assert sizes[name] == (4608, 4096)


def test_reference_state_dict(tmp_path, monkeypatch):
    """Names and shapes of the reference's own state dictionary, as it was really saved."""
    if not (REFERENCE / "hf_tiny_chatglm2.npz").exists():
        pytest.skip("the reference arrays are not next to the checkout")
    with np.load(REFERENCE / "hf_tiny_chatglm2.npz") as arrays:
        state = {k[3:]: arrays[k] for k in arrays.files if k.startswith("sd/")}
    raw = json.loads((REFERENCE / "hf_tiny_chatglm2_config.json").read_text())
    write_official(tmp_path, tensors=state, raw=raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    # Its vocabulary is smaller than that of any tokenizer.
    monkeypatch.setattr("convert.loading.folder.check_fit", lambda *args, **kwargs: None)
    checkpoint = load_checkpoint(tmp_path, dtype="float32")
    found = official_tensors(checkpoint.config, checkpoint.params, "float32")
    assert found.keys() - {INV_FREQ} == state.keys() - {INV_FREQ}
    for name in found.keys() - {INV_FREQ}:
        np.testing.assert_array_equal(found[name], state[name])


@pytest.mark.parametrize(
    ("bad", "stored", "dtype", "says"),
    [
        (np.nan, "float16", "auto", "(layer 1) holds nan at element 69"),
        (np.inf, "bfloat16", "auto", "(layer 1) holds inf at element 69"),
        (-np.inf, "float32", "auto", "(layer 1) holds -inf at element 69"),
        (7e4, "bfloat16", "float16", "holds 70144, which float16 cannot"),
    ],
)
def test_numbers_that_no_weight_has_are_named(tmp_path, bad, stored, dtype, says):
    tensors = official_tensors(TINY, random_params(TINY), stored)
    name = "transformer.encoder.layers.1.self_attention.dense.weight"
    tensors[name][2, 5] = bad
    write_official(tmp_path, tensors=tensors)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, dtype=dtype)
    assert name in str(caught.value) and says in str(caught.value)


def test_fingerprint_tells_weights_and_configurations_apart(tmp_path):
    def mark(name, **kwargs):
        return load_checkpoint(write_official(tmp_path / name, **kwargs)).fingerprint

    first = mark("a")
    assert len(first) == 64 and first == mark("b")
    others = [mark("c", seed=1), mark("d", config=tiny_config(seq_length=512)), mark("e", shards=1)]
    assert len({first, *others}) == 4


def test_template_and_rope_kind(tmp_path):
    unknown = ("rope_kind", "family", "interleaved_qkv", "rotary_percent")
    write_official(tmp_path, raw={"rope_ratio": 16} | dict.fromkeys(unknown))
    with pytest.raises(CheckpointError, match="--rope-scaling"):
        load_checkpoint(tmp_path)
    checkpoint = load_checkpoint(tmp_path, rope_kind="base", template="raw")
    assert (checkpoint.config.rope_kind, checkpoint.template) == ("base", "raw")
    (tmp_path / "tokenizer_config.json").write_text('{"name_or_path": "THUDM/chatglm2-6b-32k"}')
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.config.rope_kind, checkpoint.config.family) == ("linear", "chatglm2")


def test_arguments_that_are_impossible(tmp_path):
    write_official(tmp_path)
    mesh = make_mesh(parse_mesh("data=1"), jax.devices()[:1])
    for error, says, arguments in (
        (UsageError, "int3", {"dtype": "int3"}),
        (UsageError, "int3", {"quantize": "int3"}),
        (UsageError, "nested", {"layers": "nested"}),
        (UsageError, "Use glm2_jax.make_mesh", {"mesh": "tensor=8"}),
        (
            UsageError,
            "leave device out",
            {"mesh": mesh, "device": "cpu"},
        ),
        (UsageError, "cubic", {"rope_kind": "cubic"}),
        (UsageError, "alpaca", {"template": "alpaca"}),
        (UsageError, "'chatglm3' is not supported", {"template": "chatglm3"}),
        (UsageError, "unknown device 'abacus'", {"device": "abacus"}),
        (DeviceError, "no device 'tpu'", {"device": "tpu"}),
    ):
        with pytest.raises(error, match=says):
            load_checkpoint(tmp_path, **arguments)
    assert load_checkpoint(tmp_path, device="cpu").params["embed"].committed
