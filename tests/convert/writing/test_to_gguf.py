"""`convert.to_gguf`: the file read back with the package gguf, the command, and what is refused.

That llama.cpp runs such files is checked by `python -m tests.support.gguf_check`.
"""

import itertools
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import export_gguf, load_checkpoint, open_folder, to_gguf
from convert.adapters.adapter import Adapter, save_adapter
from convert.writing import gguf as gguf_layout
from glm2_jax import CheckpointError, Tokenizer, UsageError
from glm2_jax.choices import GGUF_TYPES
from tests.convert.writing.test_to_pytorch import random_lora
from tests.support.checkpoints import (
    convert_folder,
    names,
    official_tensors,
    random_params,
    tiny_config,
    write_official,
)
from tests.support.commands import exit_code
from tests.support.rank_file import rank_file
from tests.support.sp_model import sp_model, without_dummy_prefix

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

run = partial(exit_code, to_gguf.main)
BLOCK = "transformer.encoder.layers.0."
# llama.cpp's names, as src/llama-arch.cpp has them.
NAMES = {
    "transformer.embedding.word_embeddings.weight": "token_embd.weight",
    BLOCK + "input_layernorm.weight": "blk.0.attn_norm.weight",
    BLOCK + "self_attention.query_key_value.weight": "blk.0.attn_qkv.weight",
    BLOCK + "self_attention.query_key_value.bias": "blk.0.attn_qkv.bias",
    BLOCK + "self_attention.dense.weight": "blk.0.attn_output.weight",
    BLOCK + "post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    BLOCK + "mlp.dense_h_to_4h.weight": "blk.0.ffn_up.weight",
    BLOCK + "mlp.dense_4h_to_h.weight": "blk.0.ffn_down.weight",
    "transformer.encoder.final_layernorm.weight": "output_norm.weight",
    "transformer.output_layer.weight": "output.weight",
}
SHALLOW = {"num_layers": 1}


def read(path):
    """Metadata, and (kind, array) of every tensor by its name."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(size) for size in tensor.shape[::-1])
        tensors[tensor.name] = tensor.tensor_type.name, values.reshape(shape)
    return fields, tensors


def published(params, config, dtype):
    """The stored numbers in float32, under llama.cpp's names."""
    return {
        NAMES[name]: array.astype(np.float32)
        for name, array in official_tensors(config, params, dtype).items()
        if name in NAMES
    }


def assert_equal(found, expected, kind):
    """Every tensor of the file: float16 bits, or Q8_0 within half a step of each block."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        stored, values = found[name]
        columns = wanted.shape[-1]
        if wanted.ndim == 1:
            assert stored == "F32"
            np.testing.assert_array_equal(values, wanted, name)
        elif kind == "q8_0" and columns % 32 == 0:
            assert stored == "Q8_0"
            blocks = wanted.reshape(-1, 32)
            step = np.abs(blocks).max(-1, keepdims=True) / 127
            # Half a step, and what float16 makes of the scale, 127 times at most.
            bound = step * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-24
            assert (np.abs(values.reshape(-1, 32) - blocks) <= bound).all(), name
        else:
            assert stored == "F16"
            np.testing.assert_array_equal(values, wanted.astype(np.float16), name)


def write(folder, kind="f16", changes=None, **options):
    """A tiny model as a GGUF file: where it is, and its folder."""
    config = tiny_config(**(SHALLOW | (changes or {})))
    source = open_folder(write_official(folder / "a", config, **options))
    export_gguf(source, folder / "b.gguf", kind=kind)
    return folder / "b.gguf", source


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    heads=st.sampled_from([(1, 32), (4, 8), (4, 16), (8, 4), (4, 12)]),
    groups=st.sampled_from([1, 2, 4]),
    ffn=st.one_of(st.integers(1, 40), st.just(64)),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    kind=st.sampled_from(GGUF_TYPES),
    own=st.booleans(),
)
def test_every_tensor_at_any_shape(heads, groups, ffn, dtype, kind, own):
    number, head_dim = heads
    config = tiny_config(
        num_heads=number, num_kv_heads=min(groups, number), head_dim=head_dim,
        hidden_size=number * head_dim, ffn_hidden_size=ffn, **SHALLOW,
    )  # fmt: skip
    params = random_params(config)
    with tempfile.TemporaryDirectory() as name:
        source = write_official(Path(name) / "a", config, params, dtype=dtype)
        if own:
            convert_folder(open_folder(source), Path(name) / "own")
            source = Path(name) / "own"
        export_gguf(open_folder(source), Path(name) / "b.gguf", kind=kind)
        fields, found = read(Path(name) / "b.gguf")
        assert_equal(found, published(params, config, dtype), kind)
    assert fields["chatglm.feed_forward_length"] == ffn
    assert fields["chatglm.attention.head_count_kv"] == config.num_kv_heads


def test_a_quantized_folder_is_dequantized(tmp_path, capsys):
    config = tiny_config(rope_table_dtype="reference", **SHALLOW)
    official = write_official(tmp_path / "a", config, dtype="float32")
    convert_folder(open_folder(official), tmp_path / "own", quantize="int4")
    assert run(tmp_path / "own", tmp_path / "b.gguf", "--type", "f16") == 0
    err = capsys.readouterr().err
    assert "stored in int4" in err and "dequantized" in err and "rotary angles" in err
    params = load_checkpoint(tmp_path / "own", dtype="float32", quantize="none").params
    assert_equal(read(tmp_path / "b.gguf")[1], published(params, config, "float32"), "f16")


def test_metadata(tmp_path):
    path, _ = write(tmp_path, "q8_0", changes={"norm_eps": 1e-6, "num_layers": 2})
    fields, _ = read(path)
    expected = {
        "general.architecture": "chatglm",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0),
        "chatglm.context_length": 256,
        "chatglm.embedding_length": 32,
        "chatglm.block_count": 2,
        "chatglm.feed_forward_length": 48,
        "chatglm.attention.head_count": 4,
        "chatglm.attention.head_count_kv": 2,
        "chatglm.vocab_size": 640,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["chatglm.attention.layer_norm_rms_epsilon"] == np.float32(1e-6)
    assert gguf.GGUFReader(path).data_offset % 32 == 0
    linear = {"freq_base": 10000.0, "scaling.type": "linear", "scaling.factor": 16.0}
    for kind, ratio, rotation in (
        ("base", 50.0, {"freq_base": 500000.0}),
        ("linear", 16.0, linear),
    ):
        plain = without_dummy_prefix(sp_model())
        changes = {"rope_kind": kind, "rope_ratio": ratio}
        fields, _ = read(write(tmp_path / kind, changes=changes, tokenizer=plain)[0])
        start = "chatglm.rope."
        found = {x.removeprefix(start): fields[x] for x in fields if x.startswith(start)}
        assert found == rotation | {"dimension_count": 4}  # half of a head
        assert fields["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3", "codegeex2"])
def test_vocabulary(tmp_path, family):
    fields, _ = read(write(tmp_path, changes={"family": family})[0])
    texts, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = fields["tokenizer.ggml.scores"]
    assert len(texts) == len(types) == len(scores) == len(set(texts)) == 640
    tokenizer = Tokenizer.from_bytes(sp_model(), family)
    kinds = gguf.TokenType
    assert types[:3] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    for i in range(3, 640):
        if i >= tokenizer.size:
            assert (texts[i], types[i]) == (f"[PAD{i}]", kinds.UNUSED)
        elif i >= tokenizer.num_pieces:
            assert types[i] == kinds.CONTROL
        else:
            kind = kinds.NORMAL if tokenizer.byte_value(i) is None else kinds.BYTE
            assert (texts[i], types[i]) == (tokenizer.piece(i), kind)
    # Merged in the order of SentencePiece: a pair of better score is joined first.
    merged = [scores[i] for i in range(259, tokenizer.num_pieces)]
    assert merged == sorted(merged, reverse=True) and merged[0] > merged[-1]
    # Inside words these would be found; and the template has to write the names that are there.
    assert not {"sop", "eop"} & set(texts)
    assert [texts.index("[gMASK]"), texts.index("<sop>")] == tokenizer.prefix_ids
    stops = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    roles = [tokenizer.special.get(name) for name in ("<|user|>", "<|observation|>")]
    assert stops == roles
    template = fields.get("tokenizer.chat_template")
    assert (template is None) == (family == "codegeex2")
    if template is not None:
        assert "'[gMASK]' ~ '<sop>'" in template and "[gMASK]<sop>" not in template
    tokenizer.special = {tokenizer.piece(300): tokenizer.num_pieces}
    with pytest.raises(CheckpointError, match="Two of its ids have the text"):
        gguf_layout.gguf_vocabulary(tokenizer, 640)


def test_only_chunks_are_in_memory(tmp_path, monkeypatch):
    path, source = write(tmp_path, "q8_0", changes={"ffn_hidden_size": 51})
    sizes = []
    encode = gguf_layout.Tensor._encode
    monkeypatch.setattr(
        gguf_layout.Tensor, "_encode", lambda self, x: sizes.append(x.size) or encode(self, x)
    )
    monkeypatch.setattr("convert.loading.values.CHUNK_ELEMENTS", 100)
    export_gguf(source, tmp_path / "c.gguf", kind="q8_0")
    assert max(sizes) <= 100 and len(sizes) > 100
    assert (tmp_path / "c.gguf").read_bytes() == path.read_bytes()


def test_tiny_and_huge_numbers(tmp_path):
    config = tiny_config(**SHALLOW)
    params = random_params(config)
    params["layers"]["down"] *= 0
    params["layers"]["down"][0, 0, 0] = 1e-42  # its reciprocal is infinite

    def export(value, kind):
        params["layers"]["o"][0, 0] = value
        source = write_official(tmp_path / "a", config, params, dtype="float32")
        export_gguf(open_folder(source), tmp_path / "b.gguf", kind=kind)

    with pytest.raises(CheckpointError, match="dense.weight holds 70000, .*F16") as caught:
        export(7e4, "f16")
    assert "q8_0" in caught.value.fix
    with pytest.raises(CheckpointError, match="holds 9e.06, which Q8_0"):
        export(9e6, "q8_0")
    with pytest.raises(CheckpointError, match="nan"):
        export(np.nan, "q8_0")
    assert names(tmp_path) == ["a"]
    export(7e4, "q8_0")
    _, found = read(tmp_path / "b.gguf")
    assert not found["blk.0.ffn_down.weight"][1].any()
    np.testing.assert_allclose(found["blk.0.attn_output.weight"][1][0], 7e4, rtol=1e-3)


def test_the_command(tmp_path, capsys):
    config = tiny_config(ffn_hidden_size=51)
    source = write_official(tmp_path / "a", config, dtype="bfloat16")
    adapter = Adapter(random_lora(config))
    save_adapter(tmp_path / "lora", adapter)
    with_adapter = ("--adapter", tmp_path / "lora")
    assert run(source, tmp_path / "b.gguf", "--type", "q8_0", *with_adapter) == 0
    err = capsys.readouterr().err
    assert "query_key_value, dense" in err
    assert "2 tensors stay f16" in err and "have 51 (ffn_down)" in err
    assert run(source, tmp_path / "c.gguf", "--type", "f16", *with_adapter) == 0
    assert "stored in bfloat16; written as float16" in capsys.readouterr().err
    # Added in float32: the same as first merged, then written.
    convert_folder(open_folder(source), tmp_path / "own", dtype="float32", adapter=adapter)
    export_gguf(open_folder(tmp_path / "own"), tmp_path / "d.gguf", kind="f16")
    assert (tmp_path / "c.gguf").read_bytes() == (tmp_path / "d.gguf").read_bytes()
    assert run(source, tmp_path / "e.gguf") == 2  # no type
    with pytest.raises(UsageError, match="unknown type"):
        export_gguf(open_folder(source), tmp_path / "e.gguf", kind="q4_0")
    assert run(source, f"{tmp_path}/new/", "--type", "f16") == 2
    assert "new/ is a folder" in capsys.readouterr().err
    assert run(source, tmp_path / "b.gguf" / "c", "--type", "f16") == 3
    assert names(tmp_path) == ["a", "b.gguf", "c.gguf", "d.gguf", "lora", "own"]


def test_a_file_that_appears_meanwhile_stays(tmp_path):
    source = open_folder(write_official(tmp_path / "a", tiny_config(**SHALLOW)))

    def appear(done, total):
        if done == total:
            (tmp_path / "b.gguf").write_text("kept")

    for _ in range(2):  # and one that is there already
        with pytest.raises(UsageError, match="exists"):
            export_gguf(source, tmp_path / "b.gguf", kind="f16", progress=appear)
        assert (tmp_path / "b.gguf").read_text() == "kept" and names(tmp_path) == ["a", "b.gguf"]


def test_what_is_refused(tmp_path, capsys, monkeypatch):
    for number, (changes, message) in enumerate(
        (({"logn_scaling": True}, "logn_scaling"), ({"hidden_size": 40}, "heads are 32 wide"))
    ):
        folder = tmp_path / str(number)
        with pytest.raises(UsageError, match=message):  # llama.cpp does not compute it
            write(folder, changes=changes)
        assert names(folder) == ["a"]
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run(tmp_path / "nothing", tmp_path / "b.gguf", "--type", "f16") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "pip install gguf" in lines[2]


def test_the_byte_level_vocabulary_of_glm4():
    tokenizer = Tokenizer.from_bytes(rank_file(), "glm4")
    found = gguf_layout.gguf_vocabulary(tokenizer, tokenizer.size + 2)
    assert len(set(found.texts)) == len(found.texts) == tokenizer.size + 2
    kinds = {name: found.types[i] for name, i in tokenizer.special.items()}
    assert set(kinds.values()) == {gguf.TokenType.CONTROL}
    ranks = {text: rank for rank, text in enumerate(found.texts)}
    # Merging the pair with the lowest rank first, as llama.cpp does, gives the tokens of ours.
    order = {tuple(pair.split(" ")): number for number, pair in enumerate(found.merges)}
    for word in ("the", "world", "12"):
        parts = list("".join(found.texts[byte] for byte in word.encode()))
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in order]:
            left, right = min(pairs, key=order.__getitem__)
            at = next(i for i in range(len(parts)) if parts[i : i + 2] == [left, right])
            parts[at : at + 2] = [left + right]
        assert [ranks[part] for part in parts] == tokenizer.encode(word)


def test_families_that_llama_cpp_does_not_compute(tmp_path):
    for family in ("chatglm", "glm", "glm4-0414"):
        folder = SimpleNamespace(config=tiny_config(family=family))
        with pytest.raises(UsageError, match=f"A {family} model cannot be written as GGUF"):
            gguf_layout.gguf_tensors(cast(Any, folder), "f16", None)
