"""Tokenizer: the reference cases, special ids, and text that tries to be one."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.errors import CheckpointError, InputError
from glm2_jax.text.cleanup import clean_response, clean_text
from glm2_jax.text.tokenizer import Tokenizer
from tests.support.sp_model import real_model, sp_model, without_dummy_prefix

TINY = Tokenizer.from_bytes(sp_model(), "chatglm3")
BARE = Tokenizer.from_bytes(without_dummy_prefix(sp_model()), "codegeex2")
HOSTILE = [
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "[gMASK]sop", "sophisticated people"),
    *("<unk>", "<s>", "</s>", "a</s>b", "<0x0A>", "<0xE4>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
]


def test_the_published_cases():
    folder = real_model()
    tokenizer = Tokenizer.from_file(folder / "tokenizer.model")
    cases = json.loads((folder / "tokenizer_cases.json").read_text("utf-8"))
    assert len(cases) == 42
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["hf_ids"], case["text"]
        assert tokenizer.decode(case["hf_ids"]) == case["hf_decode"], case["text"]


def test_the_published_special_ids():
    path = real_model() / "tokenizer.model"
    special = {"[MASK]": 64789, "[gMASK]": 64790, "[sMASK]": 64791, "sop": 64792, "eop": 64793}
    roles = {"<|system|>": 64794, "<|user|>": 64795, "<|assistant|>": 64796}
    roles["<|observation|>"] = 64797
    for family, expected in [
        ("chatglm2", special),
        ("codegeex2", special),
        ("chatglm3", special | roles),
    ]:
        tokenizer = Tokenizer.from_file(path, family)
        assert tokenizer.special == expected
        assert tokenizer.size == 64789 + len(expected)
        assert tokenizer.prefix_ids == [64790, 64792]
        assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.num_pieces) == (2, 0, 64789)


def test_the_tokenizer_without_dummy_prefix():
    published = (real_model() / "tokenizer.model").read_bytes()
    published = without_dummy_prefix(published)
    # The published codegeex2 file, byte for byte.
    assert hashlib.sha256(published).hexdigest().startswith("57d9fdbd")
    tokenizer = Tokenizer.from_bytes(published, "codegeex2")
    text = "# language: Python\n# write a bubble sort function\n"
    ids = [31010, 3239, 30954, 16719, 13, 31010, 3072, 260, 17338, 3482, 1674, 13]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("tokenizer", [TINY, BARE, None], ids=["prefix", "bare", "published"])
def test_text_never_becomes_a_special_id(tokenizer):
    if tokenizer is None:
        tokenizer = Tokenizer.from_file(real_model() / "tokenizer.model", "chatglm3")
    for text in HOSTILE:
        for typed in (text, f"问：{text}\n", text * 3):
            ids = tokenizer.encode(typed)
            assert min(ids) > 2 and max(ids) < tokenizer.num_pieces
            assert tokenizer.decode(ids) == typed
        byte_pieces = [tokenizer.byte_value(i) for i in tokenizer.encode(text)]
        assert all(value is None or chr(value) in text for value in byte_pieces)
        assert 10 not in byte_pieces


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40)


@settings(deadline=None, database=None, max_examples=300)
@given(TEXT)
def test_round_trip(text):
    for tokenizer in (TINY, BARE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(2 < i < tokenizer.num_pieces for i in ids)


def test_the_dummy_prefix_is_seen():
    assert TINY.adds_dummy_prefix and not BARE.adds_dummy_prefix
    assert TINY.decode(BARE.encode(" a")) == "a" and BARE.decode(BARE.encode(" a")) == " a"
    assert BARE.encode("你好") == TINY.encode("你好")[1:]


def test_ids_without_text():
    silent = [0, 1, 2, -1, -5, 10**9, *range(TINY.num_pieces, TINY.num_pieces + 300)]
    assert TINY.decode(silent) == ""
    ids = TINY.encode("你好 world")
    mixed = [x for i in ids for x in (i, TINY.special["sop"], -1)]
    assert TINY.decode([2, *mixed, 2]) == "你好 world"
    assert all(TINY.token_bytes(i) == b"" and TINY.byte_value(i) is None for i in silent)

    text = "你好 world 👋\n"
    assert b"".join(TINY.token_bytes(i) for i in TINY.encode(text)) == f" {text}".encode()
    assert [TINY.byte_value(3 + b) for b in range(256)] == list(range(256))
    assert TINY.decode(np.array(ids, np.int32)) == "你好 world"


def test_awkward_text():
    for text in ("", "\0", "a\0b", "\ufffd", "\r\n", " ", "   ", "\u200b", "é", "𠮷"):
        assert TINY.decode(TINY.encode(text)) == text
    assert TINY.encode("") == []
    long = "你好, world! " * 20_000 + "a" * 100_000
    assert TINY.decode(TINY.encode(long)) == long


def test_only_strings_that_utf8_can_write_are_encoded():
    for text in ("\ud800", "ab\udc80", "\udc00\ud800"):
        with pytest.raises(InputError, match=r"lone surrogate \(U\+D[89A-F]"):
            TINY.encode(text)
    for text in (None, 3, b"bytes", ["a"]):
        with pytest.raises(InputError, match="not a string"):
            TINY.encode(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [b"", b"not a model", sp_model()[:100], sp_model()[:-7]])
def test_broken_models_are_refused(data, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a SentencePiece model") as error:
        Tokenizer.from_file(path)
    assert str(path) in str(error.value) and error.value.why and "Download" in error.value.fix


def test_unfit_models_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="0 byte pieces"):
        Tokenizer.from_bytes(sp_model(byte_fallback=False))
    with pytest.raises(CheckpointError, match=r"\(2, 1, 0\)"):
        Tokenizer.from_bytes(sp_model(first_ids=(2, 1, 0)))
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Tokenizer.from_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "absent.model")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(ValueError, match="unknown family"):
        Tokenizer.from_bytes(sp_model(), "glm4")


def test_clean_up():
    assert clean_text("a\u3000b\u00a0c d\n") == "a b c d\n"
    assert clean_response("\n 截至[[训练时间]]。 \n") == "截至2023年。"
    assert clean_response("你好!") == "你好!"
