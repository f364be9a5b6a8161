"""Fields that are empty, formats of several files, and dialogues that rows repeat."""

import itertools
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest

from glm2_jax.cli.parser import Parser
from glm2_jax.errors import InputError
from infer.datasets.formats import read_messages
from infer.evaluate.rows import BadRows, parse_row, read_rows
from tests.support.training_data import (
    GLM2,
    GLM3,
    alpaca,
    open_files,
    open_rows,
    role_messages,
    sharegpt,
    write_rows,
)
from train.data.check import check
from train.data.options import add_data_options, open_dataset

EMPTY = [None, "", " \n", [], math.nan, "[]"]
PAIR = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
WITH_ALL = {
    "alpaca": {"instruction": "Q", "output": "A"},
    "adgen": {"content": "Q", "summary": "A"},
    "prompt": {"prompt": "Q", "response": "A"},
    "sharegpt": sharegpt(("human", "Q"), ("gpt", "A")),
    "messages": role_messages(("user", "Q"), ("assistant", "A")),
}
OPTIONAL = {
    fmt: ("input", "history", "system", "tools", "weight")
    if fmt in ("alpaca", "adgen", "prompt")
    else ("system", "tools", "loss")
    for fmt in WITH_ALL
}
CASES = [
    (fmt, key, value)
    for fmt in WITH_ALL
    for key, value in itertools.product(OPTIONAL[fmt], EMPTY)
    # Text in brackets is text where text is wanted.
    if not (value == "[]" and key not in ("history", "tools"))
]


@pytest.mark.parametrize(("fmt", "key", "value"), CASES)
def test_an_empty_optional_field_is_absent(tmp_path, fmt, key, value):
    notes: list[str] = []
    dataset = open_rows(tmp_path / "data", [WITH_ALL[fmt] | {key: value}], on_note=notes.append)
    assert dataset.messages(0) == PAIR and notes == [] and dataset.files[0][2] == fmt


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


def flags(*argv):
    parser = Parser(prog="x")
    add_data_options(parser)
    parser.add_argument("--plot")
    return parser.parse_args(argv)


MODEL = SimpleNamespace(tokenizer=GLM2, template="chatglm2", config=SimpleNamespace(seq_length=300))
BOTH = alpaca("i", "o") | sharegpt(("human", "a"), ("gpt", "b"))


def test_each_file_has_its_format(tmp_path):
    both = str(write_rows(tmp_path / "both", [BOTH] * 3))
    one = str(write_rows(tmp_path / "one=2", [alpaca("i", "o")]))
    other = str(write_rows(tmp_path / "other", [sharegpt(("human", "a"), ("gpt", "b"))]))
    for fmt, content in (("alpaca", "i"), ("sharegpt", "a")):
        args = flags("--data", both, "--format", fmt, "--mix-data", both)
        dataset = open_dataset(args, MODEL)  # type: ignore[arg-type]
        assert [found for _, _, found in dataset.files] == [fmt, fmt]
        for path in (both, one, other):  # such as --val-data
            found = open_dataset(args, MODEL, path)  # type: ignore[arg-type]
            own = {one: ("alpaca", "i"), other: ("sharegpt", "a")}.get(path, (fmt, content))
            assert (found.files[0][2], found.messages(0)[0]["content"]) == own
            assert len(found.files) == 1 and found.groups[0].weight == 1
    for mixed, fmt in ((one, "alpaca"), (other, "sharegpt")):
        args = flags("--data", both, "--format", "alpaca", "--mix-data", mixed)
        assert open_dataset(args, MODEL).files[1][2] == fmt  # type: ignore[arg-type]
    with pytest.raises(InputError, match="it has the keys of alpaca and sharegpt: name the one"):
        open_dataset(flags("--data", both), MODEL)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--format adgen is none of them: leave out"):
        args = flags("--data", both, "--format", "adgen")
        open_dataset(args, MODEL, both)  # type: ignore[arg-type]


def test_evaluation_takes_a_format_too(tmp_path):
    for fmt, content in (("alpaca", "i"), ("sharegpt", "a")):
        assert parse_row("here", BOTH, fmt).messages[0]["content"] == content
    with pytest.raises(InputError, match="it has the keys of"):
        parse_row("here", BOTH)


@pytest.mark.parametrize("template", ["chatglm2", "chatglm3"])
def test_rows_that_repeat_the_dialogue_so_far_are_told(tmp_path, template):
    turns = [[f"question {n}", f"answer {n}"] for n in range(4)]
    growing = [alpaca(*turns[n], history=turns[:n]) for n in range(4)]
    tokenizer = GLM3 if template == "chatglm3" else GLM2
    path = tmp_path / "data"
    other = alpaca("another", history=[["question 0", "another answer"]])
    dataset = open_rows(path, [*growing, other], tokenizer=tokenizer, template=template)
    report = check(dataset)
    assert [pair[0] for pair in report.growing] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert report.growing[2] == (f"{path}:3", f"{path}:4")
    assert "dialogues that go on in another row: 3 rows" in report.text()
    assert "keep only the last row of each dialogue" in report.text()
    for rows in (growing[3:], [growing[3], growing[3]], [other, growing[2]]):
        text = check(open_rows(path, rows, tokenizer=tokenizer, template=template)).text()
        assert "go on" not in text


def test_a_history_as_json_text_is_one(tmp_path):
    row = alpaca(history=json.dumps([["a", "b"]]))
    assert len(open_rows(tmp_path / "data", [row])) == 2
