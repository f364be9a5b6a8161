"""Rows of every format as sequences: the ids that inference sees, and which are learned."""

import itertools
import json
import math
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.datasets.encode import Encoder
from glm2_jax.datasets.formats import read_messages
from glm2_jax.datasets.index import DataFile
from glm2_jax.datasets.rows import parse_row, read_rows
from glm2_jax.errors import InputError
from glm2_jax.text.prompt import build_prompt
from glm2_jax.text.roles import build_messages
from infer.evaluate.rows import BadRows
from tests.support.training_data import (
    CHATGLM3,
    CONVERSATIONS,
    GLM2,
    GLM3,
    ONE,
    TURNS,
    alpaca,
    answer_ids,
    learned_of,
    open_files,
    open_rows,
    role_messages,
    sharegpt,
    turns,
    write_rows,
)
from train.data.check import report

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(str.strip)
PAIR = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
PLAIN = {
    "alpaca": alpaca(),
    "adgen": {"content": "Q", "summary": "A"},
    "prompt": {"prompt": "Q", "response": "A"},
    "sharegpt": sharegpt(("human", "Q"), ("gpt", "A")),
    "messages": role_messages(("user", "Q"), ("assistant", "A")),
}


QUESTION = (("问：1+1\n等于几？", "2"),)
CASES = [(row, QUESTION, "Be brief.") for row in ONE.values()]
CASES += [(row, TURNS, "S") for row in CONVERSATIONS]


@pytest.mark.parametrize(("row", "pairs", "system"), CASES)
def test_every_answer_follows_the_prompt_that_inference_gives_it(tmp_path, row, pairs, system):
    for array in (False, True):
        dataset = open_rows(tmp_path / "data", [row], array=array)
        assert len(dataset) == len(pairs)
        for number, (question, answer) in enumerate(pairs):
            prompt = build_prompt(GLM2, "chatglm2", question, pairs[:number], system)
            sample, ids = dataset.sample(number), answer_ids(GLM2, answer)
            assert sample.ids == prompt + ids and dataset.source(number) == f"{tmp_path / 'data'}:1"
            assert sample.learned == [False] * len(prompt) + [True] * len(ids)
            assert dataset.lengths[number] == len(sample.ids)
            assert dataset.learned[number] == len(ids)
    named = open_rows(tmp_path / "named", [row], fmt=dataset.files[0][2])
    assert named.sample(0).ids == dataset.sample(0).ids


@pytest.mark.parametrize("row", CONVERSATIONS[1:3])
def test_a_chatglm3_conversation_is_a_sequence(tmp_path, row):
    dataset = open_rows(tmp_path / "data", [row], **CHATGLM3)
    sample = dataset.sample(0)
    assert len(dataset) == 1
    learned = set()
    for number, (question, answer) in enumerate(TURNS):
        prompt = build_prompt(GLM3, "chatglm3", question, TURNS[:number], "S")
        assert sample.ids[: len(prompt)] == prompt
        last = number == len(TURNS) - 1
        end = GLM3.eos_id if last else GLM3.special["<|user|>"]
        written = [*GLM3.encode("\n"), *GLM3.encode(answer), end]
        place = range(len(prompt), len(prompt) + len(written))
        assert [sample.ids[i] for i in place] == written
        learned |= set(place)
    assert [i for i, yes in enumerate(sample.learned) if yes] == sorted(learned)
    assert len(sample.ids) == max(learned) + 1


def test_chatglm3_tools_and_messages_without_text(tmp_path):
    asked, last = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    tools = {"role": "system", "content": "Use tools.", "tools": [{"name": "天气"}]}
    call = {"role": "assistant", "metadata": "search", "content": "tool_call(city='x')"}
    messages = [tools, asked, call, {"role": "observation", "content": "晴"}, last]
    sample = open_rows(tmp_path / "data", [{"messages": messages}], **CHATGLM3).sample(0)
    called = [*GLM3.encode("search\n"), *GLM3.encode(call["content"])]
    answer = [*GLM3.encode("\n"), *answer_ids(GLM3, "A")]
    assert sample.ids == build_messages(GLM3, messages)[:-1] + [GLM3.eos_id]
    assert learned_of(sample) == [*called, GLM3.special["<|observation|>"], *answer]
    with pytest.raises(InputError, match="message 1 has metadata or tools: chatglm2 cannot"):
        open_rows(tmp_path / "data", [{"messages": messages}])

    empty = call | {"content": ""}
    unlearned = {"role": "assistant", "content": "", "loss": False}
    rows: list[tuple[dict[str, Any], list[int]]] = [
        (alpaca("Q2", "A", history=[["Q1", [empty, last]]]), GLM3.encode("search\n")),
        ({"messages": [tools | {"content": ""}, asked, unlearned, asked, last]}, answer),
    ]
    for row, start in rows:
        learned = learned_of(open_rows(tmp_path / "data", [row], **CHATGLM3).sample(0))
        assert learned[: len(start)] == start and learned[-len(answer) :] == answer
    for bad in (" ", [{"role": "tool"}], [{}], [5]):
        row = alpaca(history=[["Q", bad]])
        assert open_rows(tmp_path / "data", [row], max_bad=None, **CHATGLM3).num_bad == 1


def test_raw_text_and_its_continuation(tmp_path):
    sample = open_rows(
        tmp_path / "data", [alpaca("def f():\n", "    pass")], template="raw"
    ).sample(0)
    assert sample.ids == build_prompt(GLM2, "raw", "def f():\n") + answer_ids(GLM2, "    pass")
    for more in ({"system": "S"}, {"history": [["Q", "A"]]}):
        with pytest.raises(InputError, match="raw template takes neither"):
            open_rows(tmp_path / "data", [alpaca(**more)], template="raw")


@settings(deadline=None, database=None, max_examples=60)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), system=st.none() | TEXT)
def test_the_seams_are_those_of_inference_for_any_text(turns, system):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    encoder = Encoder(GLM2, "chatglm2")
    assert encoder.count(messages) == len(turns)
    whole, learned = Encoder(GLM3, "chatglm3").encode(messages, 0)
    for number, (question, answer) in enumerate(turns):
        prompt = build_prompt(GLM2, "chatglm2", question, turns[:number], system)
        assert encoder.encode(messages, number)[0] == prompt + answer_ids(GLM2, answer)
        prompt = build_prompt(GLM3, "chatglm3", question, turns[:number], system)
        assert whole[: len(prompt)] == prompt and not learned[len(prompt) - 1]
        assert learned[len(prompt)]


def test_rows_are_read_again_from_their_place_and_refused_if_they_changed(tmp_path):
    path, rows = tmp_path / "data", [alpaca(f"Question {n}", f"Answer {n}") for n in range(300)]
    for array in (True, False):
        dataset = open_rows(path, rows, array=array)
        with patch.object(DataFile, "read", autospec=True, side_effect=DataFile.read) as read:
            sample = dataset.sample(250)
        assert GLM2.decode(learned_of(sample)) == "Answer 250"
        [(_, _, size)] = [call.args for call in read.mock_calls]
        assert size <= len(json.dumps(rows[250])) + 1
    with path.open("r+b") as file:
        file.write(json.dumps(alpaca("Question 9")).encode())
    assert dataset.sample(1).ids
    with pytest.raises(InputError, match="data:1 has changed since it was first read"):
        dataset.sample(0)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="data:2 has changed"):
        dataset.sample(1)


@pytest.mark.parametrize("fmt", PLAIN)
def test_empty_optional_fields_and_columns_of_other_formats_are_absent(tmp_path, fmt, capsys):
    pair = fmt in ("alpaca", "adgen", "prompt")
    keys = ("input", "history", "system", "tools", "weight") if pair else ("tools", "loss")
    rows = [
        PLAIN[fmt] | {key: value}
        for key, value in itertools.product(keys, [None, "", " \n", [], math.nan, "[]"])
        if value != "[]" or key in ("history", "tools")  # or it is text
    ]
    every = {key: None for row in PLAIN.values() for key in row}
    rows += [dict.fromkeys(every, fill) | PLAIN[fmt] for fill in (None, "")]
    for value in (None, "", " "):
        rows += [sharegpt(("system", value), ("human", "Q"), ("gpt", "A"))] * (fmt == "sharegpt")
        talk = role_messages(("system", value), ("user", "Q"), ("assistant", "A"))
        rows += [talk] * (fmt == "messages")
    dataset = open_rows(tmp_path / "data", rows)
    assert capsys.readouterr().err == "" and dataset.files[0][2] == fmt and not dataset.unused
    assert [dataset.messages(n) for n in range(len(dataset))] == [PAIR] * len(rows)
    if pair:  # JSON as text, of a table
        row = PLAIN[fmt] | {"history": '[["Q0", "A0"]]', "system": "S"}
        wanted = read_messages(alpaca(history=[["Q0", "A0"]], system="S"), "alpaca")
        assert read_messages(row, fmt) == wanted


def test_training_and_evaluation_judge_rows_alike(tmp_path):
    rows = [
        alpaca("a", "b", input=" "),
        alpaca("", "b", input="x"),
        alpaca("", "b", input=" "),
        alpaca("a", "b", history=""),
        alpaca("a", "b", tools=[{"name": "f"}]),
        alpaca(5, "b"),
        alpaca("a", "b", weight=3),
    ]
    for fmt in ("alpaca", "auto"):
        path = write_rows(tmp_path / "data.jsonl", rows)
        dataset = open_files([path], max_bad=None, fmt=fmt)
        bad = BadRows(99)
        good = bad.keep(read_rows(str(path)), partial(parse_row, fmt=fmt))
        found = [(dataset.source(n), dataset.messages(n)) for n in range(len(dataset))]
        assert good == found
        assert (len(good), bad.count) == (3, 4) == (len(dataset), dataset.num_bad)


@pytest.mark.parametrize("options", [{}, CHATGLM3], ids=["chatglm2", "chatglm3"])
def test_the_prompt_can_be_learned_too(tmp_path, options):
    plain = open_rows(tmp_path / "data", CONVERSATIONS[:1], **options)
    both = open_rows(tmp_path / "data", CONVERSATIONS[:1], train_on_prompt=True, **options)
    for number in range(len(plain)):
        ids = plain.sample(number).ids
        assert both.sample(number).ids == ids
        assert both.sample(number).learned == [False] * 2 + [True] * (len(ids) - 2)
    assert (both.learned == both.lengths - 2).all()


# What follows is about answers that a row marks as not to be learned.
TWO = (("Q1", "wrong"), ("Q2", "right"))
NO = [{"loss": False}, {"weight": 0}, {"train": "0.0"}]
YES = [{}, {"loss": True}, {"weight": ""}, {"weight": "1.0"}]
NOTE = "1 answer marked as not to be learned\n"


def marked(fmt: str, marks: dict, of: int = 1) -> dict:
    if fmt == "sharegpt":
        row = sharegpt(*turns(("human", "gpt"), TWO))
        row["conversations"][of] |= marks
    else:
        row = role_messages(*turns(("user", "assistant"), TWO))
        row["messages"][of] |= marks
    return row


@pytest.mark.parametrize("fmt", ["sharegpt", "messages"])
def test_a_marked_answer_is_not_learned(tmp_path, fmt, capsys):
    path = tmp_path / "data"
    right = build_prompt(GLM2, "chatglm2", "Q2", [TWO[0]]) + answer_ids(GLM2, "right")
    for marks in (*NO, *YES):
        dataset = open_rows(path, [marked(fmt, marks)])
        samples = [dataset.sample(n) for n in range(len(dataset))]
        kept = [answer_ids(GLM2, "wrong")] * (marks in YES) + [answer_ids(GLM2, "right")]
        assert [learned_of(sample) for sample in samples] == kept
        assert samples[-1].ids == right  # the next answer still follows it
        assert capsys.readouterr().err == ("" if marks in YES else NOTE)
    plain, found = (
        open_rows(path, [marked(fmt, marks)], **CHATGLM3).sample(0) for marks in ({}, NO[0])
    )
    after = [*GLM3.encode("\n"), *answer_ids(GLM3, "right")]
    before = [*GLM3.encode("\n"), *GLM3.encode("wrong"), GLM3.special["<|user|>"]]
    assert (learned_of(plain), learned_of(found)) == (before + after, after)
    assert found.ids == plain.ids
    for key, value in (("loss", 0.5), ("weight", -1), ("train", {"a": 1})):
        with pytest.raises(InputError, match=f"{key} of message 2 is .*: write 1 or true"):
            open_rows(path, [marked(fmt, {key: value})])
    if fmt == "messages":
        with pytest.raises(InputError, match="message 2 has an unknown key: 'mask'"):
            open_rows(path, [marked(fmt, {"mask": True})])
        return
    capsys.readouterr()
    open_rows(path, [marked(fmt, {"id": 7, "markdown": None}), marked(fmt, {"train": True}, of=0)])
    assert capsys.readouterr().err == (
        "keys that are not used: id in conversations (1 row), "
        "train of messages that are not answers (1 row)\n"
    )


@pytest.mark.parametrize("fmt", PLAIN)
def test_a_marked_row_is_not_learned_at_all(tmp_path, fmt):
    row = PLAIN[fmt] | ({"history": [["Q", "A"]]} if fmt in ("alpaca", "prompt") else {})
    for marks, options in zip(NO, ({}, {"train_on_prompt": True}, CHATGLM3), strict=True):
        both = open_rows(tmp_path / "data", [row | marks, row], **options)
        assert "marked as not to be learned" in report(both)
        alone = open_rows(tmp_path / "alone", [row], **options)
        found, wanted = ([x.sample(n).ids for n in range(len(x))] for x in (both, alone))
        assert found == wanted and both.num_bad == 0 and both.source(0).endswith(":2")


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
