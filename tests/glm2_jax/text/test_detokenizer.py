"""Incremental decoding equals SentencePiece's own, whatever the ids and wherever they are cut."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.text.tokenizer import Detokenizer, Tokenizer
from tests.support.sp_model import real_model, sp_model, without_dummy_prefix

TINY = Tokenizer.from_bytes(sp_model(), "chatglm3")
BARE = Tokenizer.from_bytes(without_dummy_prefix(sp_model()), "codegeex2")
CONTROL = 1  # <s>: a piece that SentencePiece itself decodes to nothing


def oracle(tokenizer, ids):
    """SentencePiece's decode, after every id that must stay silent became a control piece."""
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(tokenizer.model_bytes)
    return pieces.decode([i if 2 < i < tokenizer.num_pieces else CONTROL for i in ids])


def stream(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(i) for i in ids], detokenizer.flush()


def byte_ids(data):
    return [3 + byte for byte in data]


TRICKY_BYTES = st.sampled_from(
    [
        *(
            text.encode()
            for text in ("👋", "你", "é", "\u2581", "\ufffd", "\0", "\U0010ffff", "\ud7ff")
        ),
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


@pytest.mark.parametrize("tokenizer", [TINY, BARE], ids=["prefix", "bare"])
@settings(deadline=None, database=None, max_examples=400)
@given(ids=IDS)
def test_equals_sentencepiece(tokenizer, ids):
    parts, rest = stream(tokenizer, ids)
    assert "".join(parts) + rest == tokenizer.decode(ids) == oracle(tokenizer, ids)


@settings(deadline=None, database=None, max_examples=200)
@given(ids=IDS)
def test_what_was_emitted_is_never_taken_back(ids):
    detokenizer, said = Detokenizer(TINY), ""
    for count, token_id in enumerate(ids, 1):
        said += detokenizer.push(token_id)
        held = TINY.decode(ids[:count])[len(said) :]
        assert TINY.decode(ids[:count]).startswith(said)
        assert set(held) <= {"\ufffd"} and len(held) <= 3  # only the start of a character waits
    assert said + detokenizer.flush() == TINY.decode(ids)


@settings(deadline=None, database=None, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_whole_characters_from_bytes(text):
    parts, rest = stream(TINY, byte_ids(text.encode()))
    ends = [part for part in parts if part]
    assert ends == list(text) and rest == ""


def test_published_tokenizer_at_random():
    tokenizer = Tokenizer.from_file(real_model() / "tokenizer.model")

    @settings(deadline=None, database=None, max_examples=50)
    @given(st.lists(st.one_of(st.integers(3, 258), st.integers(-2, 65100)), max_size=20))
    def check(ids):
        parts, rest = stream(tokenizer, ids)
        assert "".join(parts) + rest == tokenizer.decode(ids) == oracle(tokenizer, ids)

    check()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_cut_off(cut):
    start = byte_ids("👋".encode()[:cut])
    parts, rest = stream(TINY, start)
    assert "".join(parts) == "" and rest == "\ufffd" * cut
    letter = BARE.encode("a")
    parts, rest = stream(BARE, start + letter)
    assert parts[-1] == "\ufffd" * cut + "a" and rest == ""
    parts, rest = stream(TINY, [*start, TINY.special["sop"], *start])
    assert parts[cut] == "\ufffd" * cut and rest == "\ufffd" * cut


def test_only_the_first_space_is_dropped():
    (space,) = BARE.encode(" ")
    assert TINY.decode([space]) == ""
    assert TINY.decode([space, space]) == " "
    assert TINY.decode([2, TINY.special["sop"], space, space]) == " "
    assert TINY.decode([*byte_ids(b"\n"), space]) == "\n "
    assert TINY.decode([*byte_ids(b" "), space]) == "  "
    assert BARE.decode([space]) == " "
