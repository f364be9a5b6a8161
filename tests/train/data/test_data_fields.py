"""Fields that are empty, formats of several files, and dialogues that rows repeat."""

import itertools
import json
import math
from functools import partial

import pytest

from glm2_jax.errors import InputError
from infer.datasets.formats import read_messages
from infer.evaluate.rows import BadRows, parse_row, read_rows
from tests.support.training_data import (
    alpaca,
    open_files,
    open_rows,
    role_messages,
    sharegpt,
    write_rows,
)

PAIR = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
WITH_ALL = {
    "alpaca": {"instruction": "Q", "output": "A"},
    "adgen": {"content": "Q", "summary": "A"},
    "prompt": {"prompt": "Q", "response": "A"},
    "sharegpt": sharegpt(("human", "Q"), ("gpt", "A")),
    "messages": role_messages(("user", "Q"), ("assistant", "A")),
}


@pytest.mark.parametrize("fmt", WITH_ALL)
def test_an_empty_optional_field_is_absent(tmp_path, fmt):
    pair = fmt in ("alpaca", "adgen", "prompt")
    keys = ("input", "history", "system", "tools", "weight") if pair else ("tools", "loss")
    for key, value in itertools.product(keys, [None, "", " \n", [], math.nan, "[]"]):
        if value == "[]" and key not in ("history", "tools"):
            continue  # text in brackets is text where text is wanted
        notes: list[str] = []
        dataset = open_rows(tmp_path / "data", [WITH_ALL[fmt] | {key: value}], on_note=notes.append)
        assert dataset.messages(0) == PAIR and notes == [] and dataset.files[0][2] == fmt, key


@pytest.mark.parametrize("value", [None, "", " "])
def test_an_empty_system_message_is_none(tmp_path, value):
    for row in (
        sharegpt(("system", value), ("human", "Q"), ("gpt", "A")),
        role_messages(("system", value), ("user", "Q"), ("assistant", "A")),
    ):
        assert open_rows(tmp_path / "data", [row]).messages(0) == PAIR
    entries = [{"role": "system", "content": "S", "tools": [], "metadata": ""}, *PAIR]
    assert read_messages({"messages": entries}, "messages")[0] == {"role": "system", "content": "S"}
    tools = {"role": "system", "content": "", "tools": [{"name": "f"}]}
    assert read_messages({"messages": [tools, *PAIR]}, "messages")[0] == tools


def test_the_columns_of_other_formats_may_be_empty(tmp_path):
    every = {key: None for row in WITH_ALL.values() for key in row}
    for fmt, row in WITH_ALL.items():
        for fill in (None, ""):
            found = open_rows(tmp_path / "data", [dict.fromkeys(every, fill) | row])
            assert (found.files[0][2], found.messages(0), found.unused) == (fmt, PAIR, {})


def test_prompt_and_response_with_history(tmp_path):
    row = {"prompt": "Q", "response": "A", "history": [["Q0", "A0"]], "system": "S"}
    dataset = open_rows(tmp_path / "data", [row])
    same = open_rows(tmp_path / "same", [alpaca("Q", "A", history=[["Q0", "A0"]], system="S")])
    assert len(dataset) == 2 and dataset.files[0][2] == "prompt"
    assert [dataset.sample(n).ids for n in (0, 1)] == [same.sample(n).ids for n in (0, 1)]
    assert len(open_rows(tmp_path / "data", [row], fmt="prompt")) == 2


def test_training_and_evaluation_judge_rows_alike(tmp_path):
    rows = [
        {"instruction": "a", "input": " ", "output": "b"},
        {"instruction": "a", "system": "\n", "output": "b"},
        {"instruction": "", "input": "x", "output": "b"},
        {"instruction": "", "input": " ", "output": "b"},
        {"instruction": "a", "output": " "},
        {"instruction": "a", "output": "b", "history": ""},
        {"instruction": "a", "output": "b", "history": [["", "b"]]},
        {"instruction": "a", "output": "b", "tools": [{"name": "f"}]},
        {"instruction": 5, "output": "b"},
        {"instruction": "a", "output": "b", "weight": 3},
    ]
    for fmt in ("alpaca", "auto"):
        path = write_rows(tmp_path / "data.jsonl", rows)
        dataset = open_files([path], max_bad=None, fmt=fmt)
        bad = BadRows(99)
        good = bad.keep(read_rows(str(path)), partial(parse_row, fmt=fmt))
        assert [row.where for row in good] == [dataset.source(n) for n in range(len(dataset))]
        assert [list(row.messages) for row in good] == [
            dataset.messages(n) for n in range(len(dataset))
        ]
        assert (len(good), bad.count) == (4, 6) == (len(dataset), dataset.num_bad)


BOTH = alpaca("i", "o") | sharegpt(("human", "a"), ("gpt", "b"))


def test_evaluation_takes_a_format_too(tmp_path):
    for fmt, content in (("alpaca", "i"), ("sharegpt", "a")):
        assert parse_row("here", BOTH, fmt).messages[0]["content"] == content
    with pytest.raises(InputError, match="it has the keys of"):
        parse_row("here", BOTH)


def test_a_history_as_json_text_is_one(tmp_path):
    row = alpaca(history=json.dumps([["a", "b"]]))
    assert len(open_rows(tmp_path / "data", [row])) == 2
