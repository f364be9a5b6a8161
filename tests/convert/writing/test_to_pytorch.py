"""`convert.to_pytorch` without PyTorch: the official layout, the command, and what is refused."""

import importlib.util
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import export_folder, load_checkpoint, open_folder, to_pytorch
from convert.adapters.adapter import Adapter, save_adapter
from convert.files.shards import open_weights
from convert.files.tensor import StoredTensor
from convert.layouts.hf_config import native_config
from convert.layouts.names import GLM, INV_FREQ, PARTS, PUBLISHED, Match
from convert.loading.folder import Folder
from convert.writing import pytorch
from convert.writing.own import convert_folder
from glm2_jax import PRESETS, CheckpointError, UsageError
from glm2_jax.lora import TARGETS, LoRA, adapter_shapes
from tests.support.checkpoints import TINY, names, random_params, save, tiny_config, write_official
from tests.support.commands import exit_code
from tests.support.shared_data import shared_path

run = partial(exit_code, to_pytorch.main)


def tensors(folder):
    """Everything that a folder stores, by name; bit patterns, so that types count, too."""
    return {name: (t.dtype, t.read()) for name, t in open_weights(folder).tensors.items()}


def random_lora(config=TINY, rank=3, size=0.2, *, targets=tuple(TARGETS), seed=1, **scale):
    """An adapter that changes what it is added to."""
    random = np.random.default_rng(seed)
    layers: dict[str, Any] = {
        target: {
            name: size * random.standard_normal((config.num_layers, *shape), np.float32)
            for name, shape in adapter_shapes(config, target, rank).items()
        }
        for target in targets
    }
    return LoRA(layers, FrozenDict(dict.fromkeys(targets, 2.0) | scale))


@pytest.mark.parametrize("rules", [PUBLISHED, GLM], ids=["official", "glm"])
def test_a_table_covers_every_parameter_once(rules):
    parts = [part.path for rule in rules for part in rule.parts]
    assert sorted(parts) == sorted(part.path for part in PARTS)
    for rule in rules:
        elements = sum(np.prod(part.shape(TINY)) for part in rule.parts)
        assert np.prod(rule.shape(TINY)) == elements


def test_shards_and_index(tmp_path):
    save(tmp_path / "own")
    source = open_folder(tmp_path / "own")
    export_folder(source, tmp_path / "b", layout="chatglm", max_shard_size=20_000)
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and files < set(names(tmp_path / "b"))
    stored = tensors(tmp_path / "b")
    assert index["metadata"]["total_size"] == sum(x.nbytes for _, x in stored.values())
    header = (tmp_path / "b" / min(files)).read_bytes()[8:200]
    assert b'"format": "pt"' in header  # transformers refuses others


def test_the_official_configuration(tmp_path):
    source = write_official(tmp_path / "a", raw={"_name_or_path": "THUDM/chatglm2-6b"})
    export_folder(open_folder(source), tmp_path / "b", layout="chatglm", dtype="bfloat16")
    raw = json.loads((tmp_path / "b/config.json").read_text())
    published = {"model_type": "chatglm", "add_qkv_bias": True, "multi_query_group_num": 2,
                 "torch_dtype": "bfloat16", "padded_vocab_size": 640, "kv_channels": 8,
                 "apply_query_key_layer_scaling": True}  # fmt: skip
    assert raw.items() >= published.items()
    assert (tmp_path / "b/tokenizer.model").read_bytes() == (
        source / "tokenizer.model"
    ).read_bytes()


def test_the_6b_model_has_the_published_size():
    config = PRESETS["chatglm2-6b"]
    matches = tuple(
        Match(
            rule,
            layer,
            StoredTensor(Path("x"), np.dtype(np.float16), rule.shape(config), 0),
        )
        for rule in PUBLISHED
        for layer in rule.layers(config)
    )
    source = Folder.__new__(Folder)
    for name, value in {"config": config, "matches": matches, "scheme": None}.items():
        object.__setattr__(source, name, value)
    official = pytorch.plan_export(source, "chatglm").entries
    assert len(official) == 200
    assert sum(entry.nbytes for entry in official) == 12_487_168_064  # of the published index
    native = pytorch.plan_export(source, "glm").entries
    assert sum(entry.nbytes for entry in native) == 2 * config.num_params
    shapes = {entry.name: entry.shape for entry in native}
    assert shapes["model.layers.27.self_attn.q_proj.weight"] == (4096, 4096)
    assert shapes["model.layers.27.self_attn.k_proj.bias"] == (256,)
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (27392, 4096)


def test_the_frequencies_are_those_of_the_published_code(tmp_path):
    stored = np.load(shared_path("reference/hf_tiny_chatglm2.npz"))[f"sd/{INV_FREQ}"]
    config = tiny_config(head_dim=4 * len(stored))
    save(tmp_path / "own", random_params(config), config)
    export_folder(open_folder(tmp_path / "own"), tmp_path / "b", layout="chatglm")
    np.testing.assert_allclose(tensors(tmp_path / "b")[INV_FREQ][1], stored, rtol=1e-6)


@pytest.mark.parametrize("base", ["float32", "int8", "int4"])
def test_an_adapter_is_added_in_float32(tmp_path, base):
    convert_folder(
        open_folder(write_official(tmp_path / "a", dtype="float32")),
        tmp_path / "own",
        quantize=None if base == "float32" else base,
    )
    lora, source = random_lora(dense=0.5), open_folder(tmp_path / "own")
    export_folder(source, tmp_path / "b", layout="chatglm", lora=lora)
    found = load_checkpoint(tmp_path / "b", dtype="float32").params["layers"]
    plain = load_checkpoint(tmp_path / "own", dtype="float32", quantize="none").params["layers"]
    weights = lora.layers["query_key_value"]
    delta = 2.0 * np.einsum("lkhr,lrd->lkhd", weights["v"], weights["a"])
    np.testing.assert_allclose(found["v"], plain["v"] + delta, atol=2e-6)
    weights = lora.layers["dense"]
    delta = 0.5 * np.einsum("ldr,lrnh->ldnh", weights["b"], weights["a"])
    np.testing.assert_allclose(found["o"], plain["o"] + delta, atol=2e-6)
    np.testing.assert_array_equal(found["q_bias"], plain["q_bias"])
    # Cast at the end, and not before the sum.
    export_folder(source, tmp_path / "half", layout="chatglm", lora=lora, dtype="float16")
    half = load_checkpoint(tmp_path / "half").params["layers"]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype("float16"), y), found, half)


def test_only_chunks_are_in_memory(tmp_path, monkeypatch):
    save(tmp_path / "own")
    source, lora = open_folder(tmp_path / "own"), random_lora()
    whole = [list(e.chunks()) for e in pytorch.plan_export(source, "chatglm", lora=lora).entries]
    monkeypatch.setattr("convert.loading.values.CHUNK_ELEMENTS", 100)
    cut = [list(e.chunks()) for e in pytorch.plan_export(source, "chatglm", lora=lora).entries]
    assert max(chunk.size for chunks in cut for chunk in chunks) <= 100
    for one, other in zip(whole, cut, strict=True):
        np.testing.assert_allclose(np.concatenate(one), np.concatenate(other), atol=1e-6)


def test_a_merged_weight_that_is_too_large(tmp_path):
    save(tmp_path / "own")
    source = open_folder(tmp_path / "own")
    with pytest.raises(CheckpointError, match="float16"):
        export_folder(
            source, tmp_path / "b", layout="chatglm", lora=random_lora(size=1e3), dtype="float16"
        )
    with pytest.raises(CheckpointError, match="adapter together"):
        export_folder(source, tmp_path / "b", layout="chatglm", lora=random_lora(size=1e19))
    assert names(tmp_path) == ["own"]


def test_the_command(tmp_path, capsys):
    source = write_official(tmp_path / "a")
    save_adapter(tmp_path / "lora", Adapter(random_lora()))
    assert run(source, tmp_path / "b", "--layout", "chatglm", "--adapter", tmp_path / "lora") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'b'}\n"
    assert "query_key_value, dense" in err
    convert_folder(open_folder(source), tmp_path / "own", quantize="int8")
    assert run(tmp_path / "own", tmp_path / "c", "--layout", "chatglm", "--dequantize") == 0
    out, err = capsys.readouterr()
    assert "stored in int8, the rest float16; dequantized and written as float16" in err
    assert open_folder(tmp_path / "c").stored_dtype == "float16"


def test_what_the_new_folder_does_not_keep_is_said(tmp_path, capsys):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    source = write_official(tmp_path / "a", tiny_config(rope_table_dtype="reference"))
    assert run(source, tmp_path / "b", "--layout", "glm", "--dtype", "bfloat16") == 0
    err = capsys.readouterr().err
    assert "rotary tables" in err and "stored in float16; written as bfloat16" in err
    assert run(source, tmp_path / "c", "--layout", "chatglm") == 0
    err = capsys.readouterr().err
    assert "rotary tables" not in err and "written as" not in err


def test_bad_input_through_the_command(tmp_path, capsys):
    source = write_official(tmp_path / "a")
    command = (source, tmp_path / "b", "--layout", "chatglm")
    assert run(*command[:2]) == 2 and run(*command, "--layout", "gguf") == 2
    capsys.readouterr()
    raw = json.loads((source / "config.json").read_text())
    native = native_config(open_folder(source).config, "float16", (2,))
    (source / "config.json").write_text(json.dumps(native))
    assert run(*command) == 4
    assert "official names, but config.json has the model_type 'glm'" in capsys.readouterr().err
    (source / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    assert run(*command) == 4
    assert "'llama'" in capsys.readouterr().err
    (source / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="unknown layout"):
        export_folder(open_folder(source), "x", layout="gguf")
    assert names(tmp_path) == ["a"]


def test_logn_scaling_has_no_hf_native_form(tmp_path):
    source = open_folder(write_official(tmp_path / "a", tiny_config(logn_scaling=True)))
    with pytest.raises(UsageError, match="logn_scaling"):
        export_folder(source, tmp_path / "b", layout="glm")
    export_folder(source, tmp_path / "b", layout="chatglm")
    assert open_folder(tmp_path / "b").config.logn_scaling


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([4, 8, 12]),
    hidden=st.integers(1, 40),
    ffn=st.integers(1, 40),
    layers=st.integers(1, 3),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    shard=st.integers(1, 100_000),
)
def test_any_shape_goes_round_unchanged(kv_heads, head_dim, hidden, ffn, layers, dtype, shard):
    """Official, ours, HF-native, official again: the same bits under the same names."""
    config = tiny_config(
        num_kv_heads=kv_heads, head_dim=head_dim, hidden_size=hidden, ffn_hidden_size=ffn,
        num_layers=layers,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_official(folder / "a", config, dtype=dtype)
        convert_folder(open_folder(source), folder / "own", max_shard_size=shard)
        last = folder / "own"
        if importlib.util.find_spec("tokenizers"):
            last = folder / "glm"
            export_folder(open_folder(folder / "own"), last, layout="glm", max_shard_size=shard)
        export_folder(open_folder(last), folder / "b", layout="chatglm", max_shard_size=shard)
        before, after = tensors(source), tensors(folder / "b")
        assert before.keys() == after.keys()
        for tensor in before.keys() - {INV_FREQ}:
            assert after[tensor][0] == before[tensor][0]
            assert after[tensor][1].tobytes() == before[tensor][1].tobytes(), tensor
