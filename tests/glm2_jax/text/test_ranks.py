"""The byte-level vocabulary: GLM-4's reference cases, its streams, and files that are refused."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.errors import CheckpointError
from glm2_jax.text.ranks import BYTE_LETTERS, Ranks, ranks_from_json
from glm2_jax.text.tokenizer import SPECIAL, Detokenizer, Tokenizer
from tests.support.rank_file import fast_file, rank_file
from tests.support.shared_data import shared_file, shared_path
from tests.support.sp_model import sp_model

TINY = Tokenizer.from_bytes(rank_file(), "glm4")
LINES = rank_file().splitlines(keepends=True)


def published() -> Tokenizer:
    path = shared_path("glm-family/tokenizers/glm4_tokenizer.model")
    return Tokenizer.from_file(path, "glm4-0414")


def test_the_published_cases():
    tokenizer = published()
    known = json.loads(shared_file("glm-family/glm4_tokenizer_cases.json") or b"")
    assert len(known["cases"]) == 97
    for case in known["cases"]:
        assert tokenizer.encode(case["text"]) == case["ordinary_ids"], case["text"]
        assert tokenizer.decode(case["ordinary_ids"]) == case["ordinary_decode"], case["text"]
    for case in known["decode_cases"]:
        assert tokenizer.decode(case["ids"]) == case["skip"], case
    assert tokenizer.special == known["special"] and tokenizer.suffix_ids == []
    assert tokenizer.prefix_ids == known["prefix_ids"] == [151331, 151333]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.num_pieces) == (151329,) * 3
    assert tokenizer.size == 151343 and not tokenizer.adds_dummy_prefix
    text = known["llama_cpp_string"]
    assert tokenizer.encode(text["text"]) == text["ids"]


def test_where_a_text_is_cut():
    tokenizer = published()
    for text, parts in (
        ("I'LL it'\u017f 'tis", ["I", "'LL", " it", "'\u017f", " '", "tis"]),
        ("we\u2019ll", ["we", "\u2019ll"]),
        ("a   b", ["a", "  ", " b"]), ("a  \n  b", ["a", "  \n", " ", " b"]),
        ("x\x1cy", ["x", "\x1cy"]), ("x\x1c y", ["x", "\x1c", " y"]),
        ("a \x85b", ["a", " ", "\x85b"]), ("1234567", ["123", "456", "7"]),
        (" .\n\n .", [" .\n\n", " ."]), ("a   ", ["a", "   "]), ("a\t\tb", ["a", "\t", "\tb"]),
        ("\u00bd3\u2167x", ["\u00bd3\u2167", "x"]), ("e\u0301a", ["e", "\u0301a"]),
    ):  # fmt: skip
        assert tokenizer.encode(text) == [i for part in parts for i in tokenizer.encode(part)]
        assert len({*parts, text}) > 1


def test_long_runs_are_merged_and_the_lowest_rank_first():
    for text in ("a" * 100_000, " " * 100_000 + "x", "hello" * 20_000, "你" * 30_000):
        assert TINY.decode(TINY.encode(text)) == text
    assert [TINY.piece(i) for i in TINY.encode("hello")] == ["hello"]
    # "he" has a lower rank than "el" and "ell" is no token.
    assert [TINY.piece(i) for i in TINY.encode("helloing")] == ["he", "ll", "o", "ing"]
    assert [TINY.piece(i) for i in TINY.encode("lll")] == ["ll", "l"]  # of equal ranks the left one


def _merged(data: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The definition: merge the leftmost pair of lowest rank until there is none."""
    if data in ranks:
        return [ranks[data]]
    parts = [bytes([byte]) for byte in data]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                 if a + b in ranks]  # fmt: skip
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@settings(deadline=None, database=None, max_examples=300)
@given(st.text("helorwthing你好吗é", min_size=1, max_size=40))
def test_letters_are_merged_as_defined(word):
    ranks = {TINY.token_bytes(i): i for i in range(TINY.num_pieces)}
    assert TINY.encode(word) == _merged(word.encode(), ranks)


TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t\r'stl你好12\x1c\x85"),
    max_size=60,
)  # fmt: skip


@settings(deadline=None, database=None, max_examples=200)
@given(TEXT)
def test_round_trip(text):
    ids = TINY.encode(text)
    assert TINY.decode(ids) == text and all(0 <= i < TINY.num_pieces for i in ids)
    assert b"".join(map(TINY.token_bytes, ids)) == text.encode()


def test_text_never_becomes_a_special_id():
    for name in SPECIAL["glm4"]:
        for text in (name, f"a {name}\n{name}b"):
            ids = TINY.encode(text)
            assert max(ids) < TINY.num_pieces and TINY.decode(ids) == text
    silent = [*TINY.special.values(), -1, 10**9, TINY.size]
    assert TINY.decode(silent) == "" and {TINY.token_bytes(i) for i in silent} == {b""}


@settings(deadline=None, database=None, max_examples=300)
@given(st.lists(st.integers(-2, TINY.size + 2), max_size=30))
def test_a_stream_equals_decode_and_takes_nothing_back(ids):
    detokenizer, said = Detokenizer(TINY), ""
    for count, token_id in enumerate(ids, 1):
        said += detokenizer.push(token_id)
        assert TINY.decode(ids[:count]).startswith(said)
    assert said + detokenizer.flush() == TINY.decode(ids)
    if all(0 <= i < TINY.num_pieces for i in ids):
        data = b"".join(map(TINY.token_bytes, ids))
        assert TINY.decode(ids) == data.decode("utf-8", "replace")


def test_a_token_may_end_inside_a_character():
    half = TINY.piece_id("".join(BYTE_LETTERS[byte] for byte in "你".encode()[:2]))
    end = TINY.piece_id(BYTE_LETTERS["你".encode()[2]])
    assert half is not None and end is not None
    detokenizer = Detokenizer(TINY)
    assert [detokenizer.push(half), detokenizer.push(end), detokenizer.flush()] == ["", "你", ""]
    assert (TINY.token_text(half), TINY.token_bytes(half)) == ("", "你".encode()[:2])
    assert TINY.decode([half]) == "\ufffd"  # once, as Python does it
    assert TINY.decode([half, TINY.special["<sop>"], end]) == "\ufffd\ufffd"
    assert TINY.byte_value(end) == "你".encode()[2] and TINY.byte_value(half) is None


def swapped(number: int, line: bytes) -> bytes:
    return b"".join([*LINES[: number - 1], line, *LINES[number:]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (swapped(20, b"no rank\n"), "(?s)Line 20 .*'no rank'"),
        (swapped(20, b"Eg== -5\n"), "Line 20 "),
        (swapped(20, b"Eg== 19 19\n"), "Line 20 "),
        (swapped(20, b"Eg== 99999999999999999999\n"), "Line 20 "),
        (swapped(20, b"Eg== \xff\n"), "Line 20 "),
        (swapped(20, b"abcde 19\n"), "(?s)Line 20 .*base64"),
        (swapped(20, b"AA== 19\n"), "(?s)Line 20 .*also that of line 1"),
        (swapped(280, b"enp6 5\n"), "(?s)Line 280 .*rank 5 is also that of line 6"),
        (b"".join(LINES[:270] + LINES[271:]), "Rank 270 is missing"),
        (swapped(66, b"enp6 65\n"), "Byte 0x41 has no token"),
        (rank_file()[:-5], "Line 285 "),
        (rank_file()[:1200], "is missing|has no token|Line "),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "not a SentencePiece model"),
        (b"hello world\n" * 20, "not a SentencePiece model"),
    ],
)
def test_bad_files_are_refused(data, message):
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer.from_bytes(data, "glm4")
    assert "ownload" in error.value.fix


def test_the_order_of_lines_is_free_and_line_ends_may_be_windows():
    data = b"\r\n".join(line.strip() for line in reversed(LINES))
    assert Tokenizer.from_bytes(data, "glm4").encode("hello world") == TINY.encode("hello world")


@settings(deadline=None, database=None, max_examples=300)
@given(st.data())
def test_a_damaged_file_opens_or_is_refused(data):
    content = bytearray(rank_file())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        end = place + data.draw(st.integers(0, 12))
        content[place:end] = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from(LINES)))
    try:
        tokenizer = Tokenizer.from_bytes(bytes(content), "glm4")
    except CheckpointError as error:
        assert error.why and error.fix
    else:
        assert tokenizer.decode(tokenizer.encode("hello 你好\n")) == "hello 你好\n"


def test_each_kind_of_file_serves_its_own_families():
    for data, family, why in (
        (rank_file(), "chatglm3", "ranked bytes"),
        (rank_file(), "chatglm", "glm4 or glm4-0414"),
        (sp_model(), "glm4", "256 byte pieces"),
        (sp_model(), "glm", "chatglm2 or chatglm3 or codegeex2"),
    ):
        with pytest.raises(CheckpointError, match=why) as error:
            Tokenizer.from_bytes(data, family)
        assert f"does not belong to the {family} family" in error.value.what
    assert Tokenizer.from_bytes(rank_file(), None).family == "glm4"
    with pytest.raises(CheckpointError, match="does not belong to the chatglm2 family"):
        TINY.with_tokens("chatglm2")


def test_a_rank_file_of_tokenizer_json():
    assert ranks_from_json(json.dumps(fast_file()).encode()) == rank_file()
    assert TINY.piece(TINY.encode(" the")[0]) == "\u0120the"
    assert sorted(BYTE_LETTERS) == sorted(set(BYTE_LETTERS)) and len(BYTE_LETTERS) == 256
    for change, why in (
        ({"model": None}, "not a table"), ({"model": {"vocab": []}}, "not a table"),
        ({"model": {"vocab": {"a": -1}}}, "id of 'a' is -1"),
        ({"model": {"vocab": {"a": True}}}, "id of 'a' is True"),
        ({"model": {"vocab": {"a b": 1}}}, "'a b' is not written"),
        ({"model": {"vocab": {"": 1}}}, "is not written"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=why):
            ranks_from_json(json.dumps(fast_file() | change).encode())
    for data in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        with pytest.raises(CheckpointError, match="no byte-level vocabulary"):
            ranks_from_json(data)


def test_a_whole_published_table_survives_tokenizer_json():
    data = shared_path("glm-family/tokenizers/glm4_tokenizer.model").read_bytes()
    lines = [line.split() for line in data.splitlines()]
    names = ("".join(BYTE_LETTERS[x] for x in base64.b64decode(token)) for token, _ in lines)
    vocabulary = {name: int(rank) for name, (_, rank) in zip(names, lines, strict=True)}
    assert ranks_from_json(json.dumps({"model": {"vocab": vocabulary}}).encode()) == data


def test_the_merges_of_a_rank_file():
    vocabulary = Ranks(rank_file(), "tokenizer")
    merges = vocabulary.merges()
    assert len(set(merges)) == len(merges) and ("h", "e") in merges and ("he", "llo") not in merges
    ranks = [vocabulary.piece_id(left + right) for left, right in merges]
    assert None not in ranks and ranks == sorted(ranks, key=lambda rank: rank or 0)
    # "hello" is found as a complete part only: its merge ends with "he", "ll", "o".
    assert not any(left + right == "hello" for left, right in merges)
