"""`convert.to_pytorch` without PyTorch: the official layout, the command, and what is refused.

Quantized folders stay packed where the official form is the same.
"""

import importlib.util
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import export_folder, load_checkpoint, open_folder, to_pytorch
from convert.adapters.adapter import Adapter, save_adapter
from convert.files.shards import open_weights
from convert.layouts.names import INV_FREQ, SCALE
from convert.loading.folder import read_architecture
from convert.random import write_random
from convert.writing import pytorch
from glm2_jax import CheckpointError, UsageError
from glm2_jax.lora import TARGETS, LoRA, adapter_shapes
from glm2_jax.text.prompt import stop_ids
from tests.convert.layouts.test_family_folders import FOLDERS, small_files
from tests.support.checkpoints import (
    TINY,
    convert_folder,
    edit_json,
    names,
    random_params,
    save,
    tiny_config,
    write_official,
    write_quantized,
)
from tests.support.commands import exit_code
from tests.support.shared_data import shared_path

run = partial(exit_code, to_pytorch.main)


def tensors(folder):
    """Everything that a folder stores, by name; bit patterns, so that types count, too."""
    return {name: (t.dtype, t.read()) for name, t in open_weights(folder).tensors.items()}


def assert_same_tensors(one, other):
    """Bit by bit, types included; the unused frequencies of a source may be made up."""
    before, after = tensors(one), tensors(other)
    assert before.keys() == after.keys()
    for name in before.keys() - {INV_FREQ}:
        assert after[name][0] == before[name][0], name
        assert after[name][1].shape == before[name][1].shape, name
        assert after[name][1].tobytes() == before[name][1].tobytes(), name


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


@pytest.mark.parametrize("name", ["official glm4", "chatglm", "glm"])
def test_other_families_to_our_format_and_back(tmp_path, name):
    config, files, family = FOLDERS[name]
    vocabulary = small_files(tmp_path / "small", config, **files)
    write_random(tmp_path / "a", read_architecture(vocabulary).config.to_hf(), vocabulary)
    convert_folder(open_folder(tmp_path / "a"), tmp_path / "own")
    export_folder(open_folder(tmp_path / "own"), tmp_path / "b", layout="chatglm")
    assert names(tmp_path / "b") == names(tmp_path / "a")  # its vocabulary as it was published
    assert_same_tensors(tmp_path / "a", tmp_path / "b")
    one, other = (open_folder(tmp_path / x) for x in "ab")
    assert one.config == other.config and other.config.family == family
    assert stop_ids(one.tokenizer) == stop_ids(other.tokenizer)
    assert one.tokenizer.model_bytes == other.tokenizer.model_bytes


def test_the_official_form(tmp_path):
    source = write_official(tmp_path / "a", raw={"_name_or_path": "THUDM/chatglm2-6b"})
    shards = {"dtype": "bfloat16", "max_shard_size": 20_000}
    export_folder(open_folder(source), tmp_path / "b", layout="chatglm", **shards)
    raw = json.loads((tmp_path / "b/config.json").read_text())
    published = {"model_type": "chatglm", "add_qkv_bias": True, "multi_query_group_num": 2,
                 "torch_dtype": "bfloat16", "padded_vocab_size": 640, "kv_channels": 8,
                 "apply_query_key_layer_scaling": True}  # fmt: skip
    assert raw.items() >= published.items()
    one, other = ((x / "tokenizer.model").read_bytes() for x in (source, tmp_path / "b"))
    assert one == other
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and files < set(names(tmp_path / "b"))
    stored = tensors(tmp_path / "b")
    assert index["metadata"]["total_size"] == sum(x.nbytes for _, x in stored.values())
    header = (tmp_path / "b" / min(files)).read_bytes()[8:200]
    assert b'"format": "pt"' in header  # transformers refuses others


def test_the_frequencies_are_those_of_the_published_code(tmp_path):
    stored = np.load(shared_path("reference/hf_tiny_chatglm2.npz"))[f"sd/{INV_FREQ}"]
    config = tiny_config(head_dim=4 * len(stored))
    save(tmp_path / "own", random_params(config), config)
    export_folder(open_folder(tmp_path / "own"), tmp_path / "b", layout="chatglm")
    np.testing.assert_allclose(tensors(tmp_path / "b")[INV_FREQ][1], stored, rtol=1e-6)


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


def test_the_command_says_what_it_does_not_keep(tmp_path, capsys):
    source = write_official(tmp_path / "a", tiny_config(rope_table_dtype="reference"))
    save_adapter(tmp_path / "lora", Adapter(random_lora()))
    assert run(source, tmp_path / "b", "--layout", "chatglm", "--adapter", tmp_path / "lora") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'b'}\n" and "query_key_value, dense" in err
    assert "rotary tables" not in err and "written as" not in err
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    assert run(source, tmp_path / "c", "--layout", "glm", "--dtype", "bfloat16") == 0
    err = capsys.readouterr().err
    assert "rotary tables" in err and "stored in float16; written as bfloat16" in err


def test_what_cannot_be_written(tmp_path, capsys):
    source = write_official(tmp_path / "a", tiny_config(logn_scaling=True))
    with pytest.raises(UsageError, match="logn_scaling"):
        export_folder(open_folder(source), tmp_path / "b", layout="glm")
    export_folder(open_folder(source), tmp_path / "b", layout="chatglm")
    assert open_folder(tmp_path / "b").config.logn_scaling
    with pytest.raises(UsageError, match="unknown layout"):
        export_folder(open_folder(source), "x", layout="gguf")
    assert run(source, tmp_path / "c") == 2 and run(source, tmp_path / "c", "--layout", "gguf") == 2
    capsys.readouterr()
    for model_type, said in (("glm", "HF-native layout lacks"), ("llama", "'llama'")):
        edit_json(source / "config.json", model_type=model_type)
        assert run(source, tmp_path / "c", "--layout", "chatglm") == 4
        assert said in capsys.readouterr().err
    assert names(tmp_path) == ["a", "b"]


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
        assert_same_tensors(source, folder / "b")


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
        source = write_quantized(folder / "a", bits, config, dtype=dtype, kind=kind)
        convert_folder(open_folder(source), folder / "own", max_shard_size=shard)
        for last, new in (("own", "b"), ("a", "c")):
            export_folder(open_folder(folder / last), folder / new, layout="chatglm")
            assert_same_tensors(source, folder / new)
        raw = json.loads((folder / "b/config.json").read_text())
        assert raw["quantization_bit"] == bits and raw["torch_dtype"] == dtype
        again = open_folder(folder / "b")
        assert again.layout == f"official int{bits}" and again.config == config


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


def test_what_has_no_official_form_is_dequantized(tmp_path, capsys):
    source = open_folder(write_official(tmp_path / "a", dtype="float32"))
    save_adapter(tmp_path / "lora", Adapter(random_lora()))
    for scheme, wide, flags in (
        ("int4", False, ()),
        ("int8", True, ()),
        ("int8", False, ("--dequantize",)),
        ("int8", False, ("--adapter", tmp_path / "lora")),
    ):
        own, new = (tmp_path / f"{x}-{scheme}-{wide}-{len(flags)}" for x in ("own", "new"))
        convert_folder(source, own, quantize=scheme, quantize_embeddings=wide)
        assert run(own, new, "--layout", "chatglm", *flags) == 0
        stored = f"{scheme}+embeddings" if wide else scheme
        said = f"in {stored}, the rest float32; dequantized and written as float32"
        assert said in capsys.readouterr().err
        assert open_folder(new).scheme is None and open_folder(new).stored_dtype == "float32"
        assert not json.loads((new / "config.json").read_text()).get("quantization_bit")
        if len(flags) < 2:
            found = load_checkpoint(new, dtype="float32").params["layers"]["o"]
            expected = load_checkpoint(own, dtype="float32", quantize="none").params["layers"]["o"]
            np.testing.assert_array_equal(found, expected)
