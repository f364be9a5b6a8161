"""Tokenizer and detokenizer: the reference cases, special ids, and text that tries to be one."""

import hashlib
import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.errors import CheckpointError, InputError
from glm2_jax.text.tokenizer import Detokenizer, Tokenizer
from tests.support.sp_model import real_model, sp_model, without_dummy_prefix

TINY = Tokenizer.from_bytes(sp_model(), "chatglm3")
BARE = Tokenizer.from_bytes(without_dummy_prefix(sp_model()), "codegeex2")
CONTROL = 1  # <s>: a piece that SentencePiece itself decodes to nothing


def published(family: str = "chatglm2") -> Tokenizer:
    return Tokenizer.from_file(real_model() / "tokenizer.model", family)


def test_the_published_cases():
    tokenizer = published()
    cases = json.loads((real_model() / "tokenizer_cases.json").read_text("utf-8"))
    assert len(cases) == 42
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["hf_ids"], case["text"]
        assert tokenizer.decode(case["hf_ids"]) == case["hf_decode"], case["text"]


def test_the_published_special_ids():
    special = {"[MASK]": 64789, "[gMASK]": 64790, "[sMASK]": 64791, "sop": 64792, "eop": 64793}
    roles = {"<|system|>": 64794, "<|user|>": 64795, "<|assistant|>": 64796}
    roles["<|observation|>"] = 64797
    for family in ("chatglm2", "codegeex2", "chatglm3"):
        tokenizer = published(family)
        assert tokenizer.special == (special | roles if family == "chatglm3" else special)
        assert tokenizer.size == 64789 + len(tokenizer.special)
        assert tokenizer.prefix_ids == [64790, 64792]
        assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.num_pieces) == (2, 0, 64789)


def test_the_tokenizer_without_dummy_prefix():
    assert TINY.adds_dummy_prefix and not BARE.adds_dummy_prefix
    assert TINY.decode(BARE.encode(" a")) == "a" and BARE.decode(BARE.encode(" a")) == " a"
    assert BARE.encode("你好") == TINY.encode("你好")[1:]
    data = without_dummy_prefix((real_model() / "tokenizer.model").read_bytes())
    # The published codegeex2 file, byte for byte.
    assert hashlib.sha256(data).hexdigest().startswith("57d9fdbd")
    tokenizer = Tokenizer.from_bytes(data, "codegeex2")
    text = "# language: Python\n# write a bubble sort function\n"
    ids = [31010, 3239, 30954, 16719, 13, 31010, 3072, 260, 17338, 3482, 1674, 13]
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text


HOSTILE = [
    *("[MASK]", "[gMASK]", "sop", "eop", "[gMASK]sop", "sophisticated people"),
    *("<unk>", "<s>", "</s>", "a</s>b", "<0x0A>", "<0xE4>", "<|system|>", "<|user|>"),
]
LONG = "你好, world! " * 20_000 + "a" * 100_000
AWKWARD = ["", "\0", "a\0b", "\ufffd", "\r\n", " ", "   ", "\u200b", "é", "𠮷", LONG]


@pytest.mark.parametrize("tokenizer", [TINY, BARE, None], ids=["prefix", "bare", "published"])
def test_text_never_becomes_a_special_id(tokenizer):
    tokenizer = tokenizer or published("chatglm3")
    for text in HOSTILE:
        for typed in (text, f"问：{text}\n", text * 3):
            ids = tokenizer.encode(typed)
            assert min(ids) > 2 and max(ids) < tokenizer.num_pieces
            assert tokenizer.decode(ids) == typed
        byte_pieces = [tokenizer.byte_value(i) for i in tokenizer.encode(text)]
        assert all(value is None or chr(value) in text for value in byte_pieces)
        assert 10 not in byte_pieces
    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == []


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40)


@settings(deadline=None, database=None, max_examples=200)
@given(TEXT)
def test_round_trip(text):
    for tokenizer in (TINY, BARE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(2 < i < tokenizer.num_pieces for i in ids)


def test_ids_without_text():
    silent = [0, 1, 2, -1, -5, 10**9, *range(TINY.num_pieces, TINY.num_pieces + 300)]
    assert TINY.decode(silent) == ""
    assert all(TINY.token_bytes(i) == b"" and TINY.byte_value(i) is None for i in silent)
    ids = TINY.encode("你好 world")
    mixed = [x for i in ids for x in (i, TINY.special["sop"], -1)]
    assert TINY.decode([2, *mixed, 2]) == TINY.decode(np.array(ids, np.int32)) == "你好 world"
    text = "你好 world 👋\n"
    assert b"".join(TINY.token_bytes(i) for i in TINY.encode(text)) == f" {text}".encode()
    assert [TINY.byte_value(3 + b) for b in range(256)] == list(range(256))


def test_only_strings_that_utf8_can_write_are_encoded():
    for text in ("ab\udc80", "\udc00\ud800"):
        with pytest.raises(InputError, match=r"lone surrogate \(U\+D[89A-F]"):
            TINY.encode(text)
    for text in (None, b"bytes"):
        with pytest.raises(InputError, match="not a string"):
            TINY.encode(text)  # type: ignore[arg-type]


def test_a_path_is_enough(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sp_model())
    for tokenizer in (Tokenizer(str(path)), Tokenizer(path), Tokenizer.from_file(path)):
        assert tokenizer.family == "chatglm2" and tokenizer.encode("hi") == TINY.encode("hi")
    assert Tokenizer(path, "chatglm3").special == TINY.special
    with pytest.raises(CheckpointError, match=r"not a plain file\.\nName the tokenizer"):
        Tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"absent.model cannot be read\.\nNo such file"):
        Tokenizer(tmp_path / "absent.model")
    with pytest.raises(ValueError, match="unknown family"):
        Tokenizer(path, "glm9")


def test_unfit_models_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    for data in (b"", b"not a model", sp_model()[:100], sp_model()[:-7]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="not a SentencePiece model") as error:
            Tokenizer.from_file(path)
        assert str(path) in str(error.value) and error.value.why and "Download" in error.value.fix
    for data, message in (
        (sp_model(byte_fallback=False), "0 byte pieces"),
        (sp_model(first_ids=(2, 1, 0)), r"\(2, 1, 0\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_bytes(data)
    for place in (tmp_path / "absent.model", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            Tokenizer.from_file(place)
    with pytest.raises(ValueError, match="unknown family"):
        Tokenizer.from_bytes(sp_model(), "glm9")


def stream(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(i) for i in ids], detokenizer.flush()


def check_stream(tokenizer, ids):
    """The parts joined are the decode of all ids, which is SentencePiece's own."""
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(tokenizer.model_bytes)
    heard = [i if 2 < i < tokenizer.num_pieces else CONTROL for i in ids]
    parts, rest = stream(tokenizer, ids)
    assert "".join(parts) + rest == tokenizer.decode(ids) == pieces.decode(heard)


def byte_ids(data):
    return [3 + byte for byte in data]


TRICKY_BYTES = st.sampled_from(
    [
        *(text.encode() for text in ("👋", "你", "é", "\u2581", "\ufffd", "\0", "\U0010ffff")),
        *(b"\xf0\x9f\x91", b"\xe4\xbd", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"),
        *(b"\xe0\x80\x80", b"\xff", b"\x80", b"\xf0\x80", b"\x20"),
    ]
).map(byte_ids)
ONE = st.one_of(
    st.integers(3, 258),
    st.integers(259, TINY.num_pieces - 1),
    st.integers(-3, TINY.num_pieces + 30),
    st.sampled_from(TINY.encode("a  b\n 你好 !")),
).map(lambda i: [i])
IDS = st.lists(st.one_of(ONE, TRICKY_BYTES), max_size=25).map(lambda parts: sum(parts, []))


@settings(deadline=None, database=None, max_examples=400)
@given(ids=IDS)
def test_a_stream_equals_sentencepiece_and_takes_nothing_back(ids):
    for tokenizer in (TINY, BARE):
        check_stream(tokenizer, ids)
    detokenizer, said = Detokenizer(TINY), ""
    for count, token_id in enumerate(ids, 1):
        said += detokenizer.push(token_id)
        decoded = TINY.decode(ids[:count])
        held = decoded[len(said) :]
        assert decoded.startswith(said)
        assert set(held) <= {"\ufffd"} and len(held) <= 3  # only the start of a character waits


def test_characters_come_complete_and_the_first_space_is_dropped():
    text = "é你👋\0\ufffd"
    parts, rest = stream(TINY, byte_ids(text.encode()))
    assert [part for part in parts if part] == list(text) and rest == ""
    start, cut = byte_ids("👋".encode()[:3]), "\ufffd" * 3
    assert stream(TINY, start) == ([""] * 3, cut)
    assert stream(BARE, start + BARE.encode("a")) == ([*[""] * 3, cut + "a"], "")
    parts, rest = stream(TINY, [*start, TINY.special["sop"], *start])
    assert parts[3] == cut and rest == cut
    (space,) = BARE.encode(" ")
    sop = TINY.special["sop"]
    for ids, text in (
        ([space], ""), ([space, space], " "), ([2, sop, space, space], " "),
        ([*byte_ids(b"\n"), space], "\n "), ([*byte_ids(b" "), space], "  "),
    ):  # fmt: skip
        assert TINY.decode(ids) == text
    assert BARE.decode([space]) == " "
