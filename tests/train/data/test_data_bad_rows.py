"""Rows and files that nothing can be learned from: named, counted, never dropped."""

import json
from functools import partial
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.datasets.encode import Encoder
from glm2_jax.datasets.index import DataFile
from glm2_jax.datasets.rows import read_rows
from glm2_jax.errors import GLMError, InputError
from glm2_jax.text.prompt import build_prompt
from tests.support.fuzz_inputs import damaged
from tests.support.training_data import (
    CONVERSATIONS,
    GLM2,
    ONE,
    alpaca,
    answer_ids,
    open_files,
    open_rows,
    role_messages,
    sharegpt,
    write_rows,
)
from train.data.plan import split

DEEP = '{"instruction":' * 200 + "1" + "}" * 200
BAD_ROWS = [
    ("{", "not JSON: Expecting property name"),
    ("3", "not a JSON object"),
    (DEEP, "cannot read this JSON: it is nested too deeply"),
    ('{"instruction": 1%s}' % ("0" * 5000), "not JSON"),
    ('{"instruction": "Q", "output": "A", "output": "B"}', "the key 'output' appears twice"),
    ("{}", "no known format, its keys are none"),
    ({"question": "Q", "answer": "A"}, "no known format, its keys are 'question', 'answer': known"),
    (
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        "no known format, its keys are 'prompt', 'chosen', 'rejected': pairs of a chosen and a "
        "rejected answer are for python -m train.preference",
    ),
    (alpaca() | sharegpt(("human", "Q")), "it has the keys of alpaca and sharegpt"),
    (alpaca(query=" \n", input="\u3000"), "instruction is empty"),
    (alpaca(query=["Q"]), "instruction is not a string: it is of type list"),
    (alpaca(answer="\ud800"), "Character 1 of the text is a lone surrogate (U+D800): It is half"),
    (alpaca(history="Q"), "the history is not a list"),
    (alpaca(history=[["Q", "A"], ["", "A"]]), "message 3 (user) is empty"),
    (alpaca(tools=[{"name": "f"}]), "the row has tools outside its messages"),
    ({"prompt": None, "response": "A"}, "prompt is empty"),
    ({"conversations": []}, "the conversation does not begin with a question"),
    ({"conversations": ["Q", "A"]}, "conversations is not a list of objects"),
    (sharegpt(("human", "Q")), "the conversation does not end with an answer"),
    (sharegpt(("human", "Q"), (["gpt"], "A")), "message 2 is from ['gpt']"),
    (sharegpt(("human", "Q"), ("gpt", 1)), "message 2 (assistant) has no text in its value"),
    (sharegpt(("human", "Q"), ("human", "Q"), ("gpt", "A")), "message 2 has the role user"),
    (
        sharegpt(("human", "Q"), ("system", "S"), ("gpt", "A")),
        "message 2 (system) is not the first",
    ),
    (role_messages(("user", "Q"), ("tool", "A")), "message 2 has the role 'tool'"),
    ({"messages": [{"role": "user", "text": "Q"}]}, "message 1 has an unknown key: 'text'"),
    (alpaca("tokenizer " * 600), "too long: "),
]


def test_bad_rows_are_named(tmp_path):
    texts = [row if isinstance(row, str) else json.dumps(row) for row, _ in BAD_ROWS]  # ASCII
    for text, (_, reason) in zip(texts, BAD_ROWS, strict=True):
        dataset = open_rows(tmp_path / "data", ["", text], max_bad=None)
        assert len(dataset) == 0 and dataset.num_bad == dataset.rows == 1
        [(where, why)] = dataset.bad
        assert where == f"{tmp_path / 'data'}:2" and why.startswith(reason) and "\n" not in why


def test_the_format_that_is_named_says_what_is_missing(tmp_path):
    rows = [{"instruction": "Q", "ouput": "A"}, {"content": "Q", "summary": "A"}]
    dataset = open_rows(tmp_path / "data", rows, fmt="alpaca", max_bad=None)
    assert [why for _, why in dataset.bad] == [
        "no output: is ouput meant?",
        "no instruction: its keys are 'content', 'summary'",
    ]
    dataset = open_rows(tmp_path / "data", [alpaca(), rows[0]], max_bad=None)  # known by now
    assert dataset.bad[0][1] == "no output: is ouput meant?"


def test_how_many_bad_rows_are_too_many(tmp_path, capsys):
    path = tmp_path / "data"
    rows = [alpaca("Q1"), "nonsense", alpaca(""), alpaca("Q2"), b"\xff".decode("latin-1")]
    for max_bad in (0, 2):
        with pytest.raises(InputError) as error:
            open_rows(path, rows, max_bad=max_bad)
        assert str(error.value).startswith(
            f"3 of 5 rows cannot be used\nthe first is {path}:2: not JSON: Expecting value"
        )
    capsys.readouterr()
    dataset = open_rows(path, rows, max_bad=3)
    assert [dataset.source(i) for i in range(len(dataset))] == [f"{path}:1", f"{path}:4"]
    assert dataset.sample(1).ids == build_prompt(GLM2, "chatglm2", "Q2") + answer_ids(GLM2, "A")
    assert capsys.readouterr().err.splitlines() == [
        f"{path}:2, 5: not JSON: Expecting value: column 1 (2 rows)",
        f"{path}:3: instruction is empty",
        "3 of 5 rows cannot be used and are left out",
    ]
    with pytest.raises(InputError, match="data has no row that can be learned from\nthe first is"):
        open_rows(path, [alpaca(""), "x"], max_bad=99)
    capsys.readouterr()
    bad = [f"[{n}" + " " * n + "x" for n in range(29)]  # each in another column
    with pytest.raises(InputError, match="31 of 32 rows"):
        open_rows(path, [alpaca(), "x", "x", *bad])
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 21 and notes[-1] == "... and 10 more bad rows"
    assert notes[0] == f"{path}:2-3: not JSON: Expecting value: column 1 (2 rows)"


def test_places_in_what_is_not_json_or_not_utf8(tmp_path):
    path = tmp_path / "data"
    row = json.dumps(alpaca())[:-1]  # its end is missing; not "line 2 column 1"
    with pytest.raises(InputError, match=f"',' delimiter: column {len(row) + 1}$"):
        open_rows(path, [row])
    with pytest.raises(InputError, match="data:2: ") as error:
        open_rows(path, ['1,\n{"a": }'], array=True)
    assert "char" not in str(error.value) and "line 2" not in str(error.value)
    row = json.dumps(alpaca("今天天气怎么样", "今天天气很好"), ensure_ascii=False)
    path.write_bytes(row.encode("gb18030"))
    with pytest.raises(InputError, match=r"data:1: not UTF-8: byte 18 cannot be read"):
        open_files([path])
    path.write_bytes(f"[{row},".encode() + row.encode("gb18030") + b"]")
    with pytest.raises(InputError, match=r"1 of 2 rows .*\n.*data, row 2: not UTF-8"):
        open_files([path])


def test_what_is_too_long(tmp_path, monkeypatch):
    path = tmp_path / "data"
    length = int(open_rows(path, [alpaca()]).lengths[0])
    assert len(open_rows(path, [alpaca()], max_length=length)) == 1
    with pytest.raises(InputError, match=f"too long: {length} tokens, at most {length - 1}"):
        open_rows(path, [alpaca()], max_length=length - 1)
    row = alpaca("Q" * 40, history=[["Q", "A"]])  # only its second sequence is too long
    dataset = open_rows(path, [row], max_length=length + 20, max_bad=None)
    assert len(dataset) == 0 and dataset.bad_reasons == {"too long": 1}
    row = alpaca("Q", history=[["Q", "A"]] * 400)
    with patch.object(Encoder, "encode", autospec=True, side_effect=Encoder.encode) as encode:
        open_rows(path, [row], max_bad=None)
    assert encode.call_count == 1
    monkeypatch.setattr("train.data.dataset.DataFile", partial(DataFile, max_row=1000))
    dataset = open_rows(path, [alpaca("x" * 2000), alpaca()], max_bad=1)
    assert dataset.bad == [(f"{path}:1", "the row is too long to be read: 2035 bytes")]


def test_a_file_that_mixes_formats_is_refused(tmp_path):
    path = tmp_path / "data"
    rows = [{"x": 1}, alpaca(), alpaca(), ONE["sharegpt"], alpaca()]
    with pytest.raises(InputError, match="mixes formats\nline 2 is alpaca, line 4 is sharegpt"):
        open_rows(path, rows, max_bad=None)
    with pytest.raises(InputError, match="row 1 is alpaca, row 3 is adgen"):
        open_rows(path, [alpaca(), alpaca(), {"content": "Q", "summary": "A"}], array=True)
    paths = [write_rows(tmp_path / fmt, [row]) for fmt, row in ONE.items()]  # each has its own
    dataset = open_files(paths)
    assert [fmt for _, _, fmt in dataset.files] == list(ONE)
    assert [dataset.source(i) for i in range(3)] == [f"{path}:1" for path in paths]


SEEDS = st.sampled_from([json.dumps(row).encode() for row in (*ONE.values(), *CONVERSATIONS)])


@settings(deadline=None, database=None, max_examples=100)
@given(damaged(SEEDS), damaged(SEEDS), st.sampled_from([(b"", b"\n"), (b"[", b",")]))
def test_damaged_files_give_rows_or_reasons(tmp_path_factory, first, second, frame):
    path = tmp_path_factory.mktemp("damaged") / "data"
    path.write_bytes(frame[0] + first + frame[1] + second + frame[0].replace(b"[", b"]"))
    try:
        dataset = open_files([path], max_bad=None)
    except GLMError as error:
        assert isinstance(error, InputError)
        return
    for index, length in enumerate(dataset.lengths):
        assert len(dataset.sample(index).ids) == length


# What follows is about the place of a row, which distinguishes it from all others.
ROWS = [alpaca(f"Q{n}", f"A{n}") for n in range(40)]
LAYOUTS = {
    "one line": json.dumps(ROWS),
    "four lines": "[" + ",\n".join(", ".join(map(json.dumps, ROWS[n::4])) for n in range(4)) + "]",
    "a row a line": json.dumps(ROWS, indent=1),
    "lines": "\n".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_split_and_named_however_the_file_is_laid_out(tmp_path, layout):
    path = tmp_path / "data.json"
    path.write_text(LAYOUTS[layout])
    dataset = open_files([path])
    assert [len(part) for part in split(dataset, 0.25, 3)] == [30, 10]
    places = [dataset.source(index) for index in range(40)]
    assert len(set(places)) == 40
    one = {"one line": ", row 18", "four lines": ", row 18", "lines": ":18"}.get(layout, ":70")
    assert f"{path}{one}" in places
    assert [where for where, _ in read_rows(str(path))] == places  # evaluation names the same


def test_all_sequences_of_a_row_are_on_one_side_of_a_split(tmp_path):
    rows = [alpaca(f"Q{n}", history=[["a", "b"], ["c", "d"]]) for n in range(8)]
    for part in split(open_rows(tmp_path / "data", rows, array=True), 0.5, 0):
        names = [part.source(index) for index in range(len(part))]
        assert len(names) == 12 and sorted(names) == sorted(3 * list(dict.fromkeys(names)))
    path = write_rows(tmp_path / "data", ROWS, array=True)
    copy = write_rows(tmp_path / "copy", ROWS, array=True)
    kept, out = split(open_files([path, path, copy], mix=(copy, 0.5)), 0.25, 1)
    assert [group.general for group in out.groups] == [False] * 3 + [True]
    assert (len(kept), len(out)) == (130, 30)  # general rows are never for validation
    sides = [
        {tuple(part.sample(n).ids) for n in range(count)} for part, count in ((kept, 90), (out, 30))
    ]
    assert not sides[0] & sides[1]
