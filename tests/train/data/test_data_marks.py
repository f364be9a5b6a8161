"""Answers that a row marks as not to be learned, in every format, and what else entries hold."""

import pytest

from glm2_jax.errors import InputError
from glm2_jax.text.prompt import build_messages, build_prompt
from infer.datasets.encode import Encoder
from infer.datasets.formats import read_messages
from tests.support.training_data import (
    CHATGLM3,
    GLM2,
    GLM3,
    alpaca,
    answer_ids,
    learned_of,
    open_rows,
    role_messages,
    sharegpt,
    turns,
)
from train.data.check import check

TWO = (("Q1", "wrong"), ("Q2", "right"))
NO = [{"loss": False}, {"weight": 0}, {"train": False}, {"weight": "0.0"}]
YES = [{}, {"loss": True}, {"weight": 1}, {"loss": None}, {"weight": ""}, {"weight": "1.0"}]


def sharegpt_row(marks: dict, of: int = 1) -> dict:
    row = sharegpt(*turns(("human", "gpt"), TWO))
    row["conversations"][of] |= marks
    return row


def messages_row(marks: dict, of: int = 1) -> dict:
    row = role_messages(*turns(("user", "assistant"), TWO))
    row["messages"][of] |= marks
    return row


ROWS = [sharegpt_row, messages_row]


def learned(tmp_path, rows, **options) -> tuple[list[list[int]], list[str]]:
    """The learned ids of every sequence, and the notes."""
    notes: list[str] = []
    dataset = open_rows(tmp_path / "data", rows, on_note=notes.append, **options)
    return [learned_of(dataset.sample(n)) for n in range(len(dataset))], notes


@pytest.mark.parametrize("make", ROWS)
@pytest.mark.parametrize("marks", [*NO, *YES])
def test_a_marked_answer_is_not_learned(tmp_path, make, marks):
    kept = [answer_ids(GLM2, "wrong")] * (marks in YES) + [answer_ids(GLM2, "right")]
    found, notes = learned(tmp_path, [make(marks)])
    assert found == kept
    assert notes == [] if marks in YES else ["1 answer marked as not to be learned"]
    # The next answer still follows it.
    last = open_rows(tmp_path / "data", [make(marks)]).sample(len(kept) - 1)
    prompt = build_prompt(GLM2, "chatglm2", "Q2", [TWO[0]])
    assert last.ids == prompt + answer_ids(GLM2, "right")


@pytest.mark.parametrize("make", ROWS)
def test_a_chatglm3_sequence_leaves_the_marked_answer_out(tmp_path, make):
    [plain], _ = learned(tmp_path, [make({})], **CHATGLM3)
    [found], _ = learned(tmp_path, [make({"loss": False})], **CHATGLM3)
    right = [*GLM3.encode("\n"), *answer_ids(GLM3, "right")]
    wrong = [*GLM3.encode("\n"), *GLM3.encode("wrong"), GLM3.special["<|user|>"]]
    assert (plain, found) == (wrong + right, right)
    fmt = "sharegpt" if make is sharegpt_row else "messages"
    messages = [
        {"role": m["role"], "content": m["content"]}
        for m in read_messages(make({"loss": False}), fmt)
    ]
    sample = open_rows(tmp_path / "data", [make({"weight": 0})], **CHATGLM3).sample(0)
    assert sample.ids == build_messages(GLM3, messages)[:-1] + [GLM3.eos_id]


@pytest.mark.parametrize("marks", NO)
@pytest.mark.parametrize(
    "row",
    [
        alpaca(history=[["Q", "A"]]),
        sharegpt_row({}),
        messages_row({}),
        {"content": "Q", "summary": "A"},
        {"prompt": "Q", "response": "A", "history": [["Q", "A"]]},
    ],
)
def test_a_marked_row_is_not_learned_at_all(tmp_path, row, marks):
    for options in ({}, {"train_on_prompt": True}, CHATGLM3):
        both, notes = learned(tmp_path, [row | marks, row], **options)
        alone, _ = learned(tmp_path, [row], **options)
        assert both == alone and "marked as not to be learned" in notes[0]
    with pytest.raises(InputError, match="has no row that can be learned from"):
        open_rows(tmp_path / "data", [row | marks])
    dataset = open_rows(tmp_path / "data", [row | marks, row])
    assert dataset.rows == 2 and dataset.num_bad == 0
    assert "marked as not to be learned" in check(dataset).text()
    assert dataset.source(0).endswith(":2")


@pytest.mark.parametrize("template", ["chatglm2", "chatglm3"])
@pytest.mark.parametrize("of", [0, 1, 2, 3])
def test_nothing_that_is_marked_is_learned_with_its_prompt(template, of):
    """Whichever message is marked: none of its characters, and all of the others', are learned."""
    tokenizer = GLM3 if template == "chatglm3" else GLM2
    texts = ["KKK", "VVV", "WWW", "XXX"]
    roles = ("user", "assistant") * 2
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    messages[of]["loss"] = False
    encoder = Encoder(tokenizer, template, train_on_prompt=True)
    found = ""
    for number in range(encoder.count(messages)):
        ids, mask = encoder.encode(messages, number)
        parts = [i for i, yes in zip(ids, mask, strict=True) if yes and i < tokenizer.num_pieces]
        found += tokenizer.decode(parts)
    assert [text in found for text in texts] == [n != of for n in range(4)]


@pytest.mark.parametrize(("key", "value"), [("loss", 0.5), ("weight", -1), ("train", {"a": 1})])
def test_a_mark_between_yes_and_no_is_refused(tmp_path, key, value):
    for make in ROWS:
        with pytest.raises(InputError, match=f"{key} of message 2 is .*: write 1 or true"):
            open_rows(tmp_path / "data", [make({key: value})])
    with pytest.raises(InputError, match=f"{key} of the row is "):
        open_rows(tmp_path / "data", [alpaca(**{key: value})])


def test_keys_of_entries_without_effect_are_reported(tmp_path):
    rows = [
        sharegpt_row({"id": 7, "markdown": None, "text": ""}),
        sharegpt_row({"train": True}, of=0),
        sharegpt_row({"loss": False}, of=2),  # a question is not learned anyway
    ]
    _, notes = learned(tmp_path, rows)
    assert notes == [
        "keys that are not used: id in conversations (1 row), "
        "train of messages that are not answers (1 row)"
    ]
    with pytest.raises(InputError, match="message 2 has an unknown key: 'mask'"):
        open_rows(tmp_path / "data", [messages_row({"mask": True})])
    found, notes = learned(tmp_path, [messages_row({"name": None, "tool_calls": [], "id": ""})])
    assert len(found) == 2 and notes == []
