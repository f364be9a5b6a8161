"""The SentencePiece vocabularies of first-generation ChatGLM-6B and of Chinese GLM."""

import functools
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.errors import CheckpointError, InputError
from glm2_jax.text.tokenizer import SPECIAL, Detokenizer, Tokenizer
from tests.support.shared_data import shared_file, shared_path
from tests.support.sp_model import chatglm_model, sp_model, with_pieces

CHATGLM = Tokenizer.from_bytes(chatglm_model(), "chatglm")
GLM = Tokenizer.from_bytes(sp_model(byte_fallback=False), "glm")


def published(name: str, family: str) -> Tokenizer:
    return Tokenizer.from_file(shared_path(f"glm-family/tokenizers/{name}"), family)


def cases(name: str) -> dict:
    return json.loads(shared_file(f"glm-family/{name}_tokenizer_cases.json") or b"")


@pytest.mark.parametrize(("file", "offset"), [("ice_text", 0), ("ice_text_launch", 20_000)])
def test_the_published_cases_of_chatglm(file, offset):
    """The launch file's ids are 20,000 higher; it lacks pieces that the other has."""
    tokenizer, known = published(f"{file}.model", "chatglm"), cases("chatglm6b")
    assert len(known["cases"]) == 97
    for case in known["cases"]:
        ids = [i + offset for i in case["sp_ids"]]
        assert tokenizer.encode(case["text"]) == ids, case["text"]
        assert tokenizer.decode(ids) == case["sp_decode"], case["text"]
    for case in known["decode_cases"]:
        ids = [i + offset for i in case["ids"]]
        assert tokenizer.decode(ids) == case["decode_skip_special"], case
    assert tokenizer.prefix_ids == []
    assert tokenizer.suffix_ids == [i + offset for i in known["suffix_ids"]]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (130005 + offset, 3 + offset)
    assert list(tokenizer.special.values()) == [130000 + offset + i for i in range(8)]
    assert tokenizer.size == tokenizer.num_pieces == 130344 + offset
    if offset:  # ids of images
        assert tokenizer.decode([0, 5, 19_999]) == tokenizer.piece(19_999) == ""


def test_the_published_cases_of_chinese_glm():
    tokenizer = published("cog-pretrain.model", "glm")
    known = cases("glm_base")["models"]["glm-large-chinese"]
    for case in known["cases"]:
        assert tokenizer.encode_with_masks(case["text"]) == case["ids"], case["text"]
        if not {0, *tokenizer.special.values()} & {*case["ids"]}:  # those have no text here
            assert tokenizer.decode(case["ids"]) == case["decode"], case["text"]
    assert [i for i in known["special"].values() if tokenizer.special[i[0]] != i[1]] == []
    assert tokenizer.size == known["num_tokens"] == 50010
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ([50002], [50000, 50006])
    assert (tokenizer.eos_id, tokenizer.pad_id) == (50007, 50000)
    # glm-10b-chinese was trained with another id of [gMASK]: ids are data.
    other = tokenizer.with_tokens("glm", tokenizer.special | {"[gMASK]": 50007})
    assert other.encode_with_masks("a[gMASK]")[-1] == 50007


@pytest.mark.parametrize("tokenizer", [CHATGLM, GLM], ids=["chatglm", "glm"])
def test_text_never_becomes_a_special_id(tokenizer):
    typed = [*SPECIAL[tokenizer.family], "<pad>", "<s>", "</s>", "<unk>", "<0x0A>"]
    special = {*tokenizer.special.values(), tokenizer.pad_id, tokenizer.eos_id, 1, 2}
    for name in typed:
        for text in (name, f"a {name}\nb{name}"):
            assert special.isdisjoint(tokenizer.encode(text)), text
    ids = CHATGLM.encode("".join(SPECIAL["chatglm"]))
    assert CHATGLM.decode(ids) == "".join(SPECIAL["chatglm"])


def test_masks_are_blanks_where_they_are_asked_for():
    mask, whole = GLM.special["[MASK]"], GLM.special["[gMASK]"]
    text = "Hello  [MASK] world[gMASK]"
    ids = GLM.encode_with_masks(text)
    assert ids == [*GLM.encode("Hello"), mask, *GLM.encode(" world"), whole]
    assert {mask, whole}.isdisjoint(GLM.encode(text))
    assert GLM.encode_with_masks("[MASK][MASK]") == [mask, mask]
    assert GLM.encode_with_masks("Hello [mask]") == GLM.encode("Hello [mask]")
    assert GLM.encode_with_masks("") == []
    with pytest.raises(InputError, match="lone surrogate"):
        GLM.encode_with_masks("[MASK]\udc80")


def test_white_space_has_pieces():
    for run, pieces in (
        (1, []), (2, ["<|blank_2|>"]), (80, ["<|blank_80|>"]), (81, ["<|blank_80|>"]),
        (82, ["<|blank_80|>", "<|blank_2|>"]), (163, ["<|blank_80|>"] * 2 + ["<|blank_3|>"]),
    ):  # fmt: skip
        ids = CHATGLM.encode(f"a{' ' * run}b")
        found = [CHATGLM.piece(i) for i in ids if "blank" in CHATGLM.piece(i)]
        assert found == pieces and CHATGLM.decode(ids) == f"a{' ' * run}b"
    assert [CHATGLM.piece(i) for i in CHATGLM.encode("\n\t")][-2:] == ["<n>", "<|tab|>"]
    assert CHATGLM.decode(CHATGLM.encode("<n>a<|blank_3|>")) == "\na   "  # as published
    # Only a space that SentencePiece adds is dropped at the start, not those of a blank.
    (blank,) = [i for i in range(CHATGLM.size) if CHATGLM.piece(i) == "<|blank_2|>"]
    assert CHATGLM.decode([blank]) == "  " and CHATGLM.token_text(blank) == "  "


PLAIN = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581<")
TEXT = st.text(st.one_of(PLAIN, st.sampled_from("   \n\t你a")), max_size=40)


@settings(deadline=None, database=None, max_examples=200)
@given(TEXT)
def test_round_trip(text):
    ids = CHATGLM.encode(text)
    detokenizer = Detokenizer(CHATGLM)
    parts = [detokenizer.push(i) for i in ids]
    assert "".join(parts) + detokenizer.flush() == CHATGLM.decode(ids) == text


@functools.cache
def ice_text() -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    tokenizer, model = (
        published("ice_text.model", "chatglm"),
        sentencepiece.SentencePieceProcessor(),
    )
    model.LoadFromSerializedProto(tokenizer.model_bytes)
    return tokenizer, model


@settings(deadline=None, database=None, max_examples=200)
@given(st.lists(st.one_of(st.integers(4, 500), st.integers(0, 130_343), st.just(5)), max_size=20))
def test_streams_of_the_published_file_equal_sentencepiece(ids):
    tokenizer, model = ice_text()
    ids = [i for i in ids if i and not (i == 4 or 130_008 <= i < 130_088)]  # no white space
    assert tokenizer.decode(ids) == model.decode(ids)


def test_files_that_fit_no_family_are_refused():
    for data, family, why in (
        (sp_model(byte_fallback=False), "chatglm", "That suits glm"),
        (chatglm_model(), "glm", "pieces for blanks. That suits chatglm"),
        (with_pieces(sp_model(), ["<|blank_2|>"], kind=4), "chatglm", "no token"),
        (with_pieces(sp_model(byte_fallback=False), ["<0x00>"], kind=6), None, "not a Sentence"),
    ):
        with pytest.raises(CheckpointError, match=why):
            Tokenizer.from_bytes(data, family)
    assert Tokenizer.from_bytes(chatglm_model(), None).family == "chatglm"
    assert Tokenizer.from_bytes(sp_model(byte_fallback=False), None).family == "glm"
