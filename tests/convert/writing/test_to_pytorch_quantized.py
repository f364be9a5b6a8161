"""`convert.to_pytorch` of quantized folders: packed where the official form is the same."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import export_folder, load_checkpoint, open_folder
from convert.adapters.adapter import Adapter, save_adapter
from convert.layouts.names import INV_FREQ, PUBLISHED, SCALE
from convert.writing.own import convert_folder
from glm2_jax.quant import pack_int4
from glm2_jax.schemes import SCHEMES
from tests.convert.writing.test_to_pytorch import random_lora, run, tensors
from tests.support.checkpoints import (
    TINY,
    official_tensors,
    random_params,
    tiny_config,
    write_official,
)


def write_packed(folder, bits, config=TINY, dtype="float16", **kwargs):
    """An official int4 or int8 folder of random integers, its scales in the type of the rest."""
    random = np.random.default_rng(bits)
    stored = official_tensors(config, random_params(config), dtype)
    for rule in PUBLISHED:
        for layer in rule.layers(config) if rule.quantized(SCHEMES["int8"]) else ():
            name, shape = rule.full_name(layer), rule.shape(config)
            limit = 2 ** (bits - 1)
            integers = random.integers(-limit, limit, shape, dtype=np.int8)
            scales = random.uniform(0.001, 0.02, shape[0]).astype(stored[name].dtype)
            stored[name] = pack_int4(integers) if bits == 4 else integers
            stored[name + SCALE] = scales
    return write_official(folder, config, tensors=stored, raw={"quantization_bit": bits}, **kwargs)


def assert_same_tensors(one, other):
    """Bit by bit, types included; the unused frequencies of the source are made up."""
    before, after = tensors(one), tensors(other)
    assert before.keys() == after.keys()
    for name in before.keys() - {INV_FREQ}:
        assert after[name][0] == before[name][0], name
        assert after[name][1].shape == before[name][1].shape, name
        assert after[name][1].tobytes() == before[name][1].tobytes(), name


@settings(max_examples=8, derandomize=True, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([1, 2, 4]),
    hidden=st.integers(1, 20).map(lambda half: 2 * half),
    ffn=st.integers(1, 40),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    kind=st.sampled_from(["bin", "safetensors"]),
    shard=st.integers(1, 100_000),
)
def test_official_to_ours_to_official_stays_packed(bits, kv_heads, hidden, ffn, dtype, kind, shard):
    config = tiny_config(
        num_kv_heads=kv_heads, hidden_size=hidden, ffn_hidden_size=ffn + (bits == 4) * (ffn % 2)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_packed(folder / "a", bits, config, dtype, kind=kind)
        convert_folder(open_folder(source), folder / "own", max_shard_size=shard)
        export_folder(
            open_folder(folder / "own"), folder / "b", layout="chatglm", max_shard_size=shard
        )
        assert_same_tensors(source, folder / "b")
        raw = json.loads((folder / "b/config.json").read_text())
        assert raw["quantization_bit"] == bits and raw["torch_dtype"] == dtype
        again = open_folder(folder / "b")
        assert again.layout == f"official int{bits}" and again.config == config
        assert run(source, folder / "c", "--layout", "chatglm", "--max-shard-size", "20kB") == 0
        assert_same_tensors(source, folder / "c")


def test_our_own_int8_is_the_official_one_with_exact_scales(tmp_path, capsys):
    source = write_official(tmp_path / "a")
    convert_folder(open_folder(source), tmp_path / "own", quantize="int8")
    assert run(tmp_path / "own", tmp_path / "b", "--layout", "chatglm") == 0
    assert "the scales are written in float32: float16 does not hold" in capsys.readouterr().err
    convert_folder(open_folder(tmp_path / "b"), tmp_path / "again")
    assert_same_tensors(tmp_path / "own", tmp_path / "again")
    name = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    found, own = tensors(tmp_path / "b"), tensors(tmp_path / "own")
    joined = np.concatenate([own[f"layers.1.{x}"][1].reshape(-1, 32) for x in "qkv"])
    np.testing.assert_array_equal(found[name][1], joined)
    assert found[name + SCALE][0] == np.float32 and found[name][0] == np.int8


@pytest.mark.parametrize(
    ("scheme", "wide", "flags"),
    [
        ("int4", False, ()),
        ("int8", True, ()),
        ("int8", False, ("--dequantize",)),
        ("int8", False, ("--adapter",)),
        ("int8", False, ("--layout", "glm")),
    ],
    ids=["grouped int4", "embeddings", "asked for", "adapter", "glm"],
)
def test_what_has_no_such_form_is_dequantized(tmp_path, capsys, scheme, wide, flags):
    if "glm" in flags:
        pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    source = open_folder(write_official(tmp_path / "a", dtype="float32"))
    convert_folder(source, tmp_path / "own", quantize=scheme, quantize_embeddings=wide)
    if "--adapter" in flags:
        save_adapter(tmp_path / "lora", Adapter(random_lora()))
        flags = ("--adapter", tmp_path / "lora")
    assert run(tmp_path / "own", tmp_path / "b", "--layout", "chatglm", *flags) == 0
    err = capsys.readouterr().err
    stored = f"{scheme}+embeddings" if wide else scheme
    assert f"stored in {stored}, the rest float32; dequantized and written as float32" in err
    new = open_folder(tmp_path / "b")
    assert new.scheme is None and new.stored_dtype == "float32"
    raw = json.loads((tmp_path / "b/config.json").read_text())
    assert not raw.get("quantization_bit")
    if not flags or flags[0] != "--adapter":
        found = load_checkpoint(new.path, dtype="float32").params["layers"]["o"]
        own = load_checkpoint(tmp_path / "own", dtype="float32", quantize="none")
        np.testing.assert_array_equal(found, own.params["layers"]["o"])
