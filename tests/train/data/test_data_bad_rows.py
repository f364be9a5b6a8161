"""Rows, files and options that nothing can be learned from: named, counted, never dropped."""

import json
from functools import partial
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.errors import GLMError, InputError
from glm2_jax.text.prompt import build_prompt
from infer.datasets.encode import Encoder
from infer.datasets.index import DataFile
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
)
from train.data.summary import summed

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
        alpaca() | role_messages(("user", "Q"), ("assistant", "A")),
        "it has the keys of alpaca and messages",
    ),
    (alpaca(query=" \n", input="\u3000"), "instruction is empty"),
    (alpaca(answer=" \n"), "output is empty"),
    (alpaca(answer=None), "output is not a string: it is of type NoneType"),
    (alpaca(query=["Q"]), "instruction is not a string: it is of type list"),
    (alpaca(answer="\ud800"), "Character 1 of the text is a lone surrogate (U+D800): It is half"),
    (alpaca(history="Q"), "the history is not a list"),
    (alpaca(history=[["Q"]]), "turn 1 of the history"),
    (alpaca(history=[["Q", "A"], ["", "A"]]), "message 3 (user) is empty"),
    (alpaca(tools=[{"name": "f"}]), "the row has tools outside its messages"),
    ({"content": 1, "summary": "A"}, "content is not a string"),
    ({"conversations": []}, "the conversation does not begin with a question"),
    ({"conversations": ["Q", "A"]}, "conversations is not a list of objects"),
    (sharegpt(("human", "Q")), "the conversation does not end with an answer"),
    (sharegpt(("gpt", "A")), "the conversation does not begin with a question"),
    (sharegpt(("human", "Q"), (["gpt"], "A")), "message 2 is from ['gpt']"),
    (sharegpt(("human", "Q"), ("gpt", 1)), "message 2 has no text in its value"),
    (sharegpt(("human", "Q"), ("human", "Q"), ("gpt", "A")), "message 2 has the role user"),
    (
        sharegpt(("system", "S"), ("system", "S"), ("human", "Q"), ("gpt", "A")),
        "message 2 (system) is not the first",
    ),
    (
        sharegpt(("human", "Q"), ("observation", "O"), ("gpt", "A")),
        "message 2 has the role observation",
    ),
    (role_messages(("user", "Q"), ("tool", "A")), "message 2 has the role 'tool'"),
    (role_messages(("user", "Q"), ("assistant", None)), "message 2 (assistant) has no text"),
    ({"prompt": None, "response": "A"}, "prompt is empty"),
    (
        {"messages": [{"role": "user", "content": "Q", "weight": -1}]},
        "weight of message 1 is -1: write 1 or true",
    ),
    ({"messages": [{"role": "user", "text": "Q"}]}, "message 1 has an unknown key: 'text'"),
    (alpaca("tokenizer " * 600), "too long: "),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_bad_rows_are_named(tmp_path, row, reason):
    text = row if isinstance(row, str) else json.dumps(row)  # ASCII: half characters go through
    dataset = open_rows(tmp_path / "data", ["", text], max_bad=None)
    assert len(dataset) == 0 and dataset.num_bad == dataset.rows == 1
    [(where, why)] = dataset.bad
    assert where == f"{tmp_path / 'data'}:2" and why.startswith(reason) and "\n" not in why


def test_the_format_that_is_named_says_what_is_missing(tmp_path):
    rows = [{"instruction": "Q", "ouput": "A"}, {"content": "Q", "summary": "A"}, {"output": "A"}]
    dataset = open_rows(tmp_path / "data", rows, fmt="alpaca", max_bad=None)
    assert [why for _, why in dataset.bad] == [
        "no output: is ouput meant?",
        "no instruction: its keys are 'content', 'summary'",
        "no instruction: its keys are 'output'",
    ]
    dataset = open_rows(
        tmp_path / "data", [alpaca(), *rows[:1]], max_bad=None
    )  # auto, known by now
    assert dataset.bad[0][1] == "no output: is ouput meant?"


def test_how_many_bad_rows_are_too_many(tmp_path):
    path, notes = tmp_path / "data", []
    rows = [alpaca("Q1"), "nonsense", alpaca(""), alpaca("Q2"), b"\xff".decode("latin-1")]
    for max_bad in (0, 2):
        with pytest.raises(InputError) as error:
            open_rows(path, rows, max_bad=max_bad)
        assert str(error.value).startswith(
            f"3 of 5 rows cannot be used\nthe first is {path}:2: not JSON: Expecting value"
        )
    dataset = open_rows(path, rows, max_bad=3, on_note=notes.append)
    assert [dataset.source(i) for i in range(len(dataset))] == [f"{path}:1", f"{path}:4"]
    assert dataset.sample(1).ids == build_prompt(GLM2, "chatglm2", "Q2") + answer_ids(GLM2, "A")
    assert notes[0] == f"{path}:2, 5: not JSON: Expecting value: column 1 (2 rows)"
    assert notes[1] == f"{path}:3: instruction is empty"
    assert notes[2] == "3 of 5 rows cannot be used and are left out"
    assert dataset.bad_reasons["not JSON"] == 2


def test_every_row_bad(tmp_path):
    with pytest.raises(InputError, match="data has no row that can be learned from\nthe first is"):
        open_rows(tmp_path / "data", [alpaca(""), "x"], max_bad=99)
    notes = []
    bad = [f"[{n}" + " " * n + "x" for n in range(29)]  # each in another column
    with pytest.raises(InputError, match="31 of 32 rows"):
        open_rows(tmp_path / "data", [alpaca(), "x", "x", *bad], on_note=notes.append)
    assert len(notes) == 21 and notes[-1] == "... and 10 more bad rows"
    assert notes[0] == f"{tmp_path / 'data'}:2-3: not JSON: Expecting value: column 1 (2 rows)"


def test_rows_with_the_same_reason_are_one_line():
    bad = [(f"a:{n}", "r") for n in (1, 2, 4, 4, 9)] + [("b:c:1", "r"), ("a:3", "s")]
    assert summed(bad) == (["a:1-2, 4, 9: r (5 rows)", "b:c:1: r", "a:3: s"], 0)
    assert summed(bad, 1)[1] == 2
    assert summed([(f"a:{2 * n}", "r") for n in range(50)])[0][0].endswith("38, ...: r (50 rows)")


def test_columns_and_lines_of_what_is_not_json(tmp_path):
    for array, why in ((False, "column 7"), (True, "data:2: ")):
        with pytest.raises(InputError, match=why) as error:
            open_rows(tmp_path / "data", ['{"a": }' if not array else '1,\n{"a": }'], array=array)
        assert "char" not in str(error.value) and "line 2" not in str(error.value)
    row = json.dumps(alpaca())[:-1]  # its end is missing; not "line 2 column 1"
    with pytest.raises(InputError, match=f"',' delimiter: column {len(row) + 1}$"):
        open_rows(tmp_path / "data", [row])


@pytest.mark.parametrize(("text", "max_bad"), [("\n", 0), ("", None), (" [ \n ] ", None)])
def test_no_rows_at_all(tmp_path, text, max_bad):
    (tmp_path / "data").write_text(text)
    with pytest.raises(InputError, match="data has no rows\nit is empty"):
        open_files([tmp_path / "data"], max_bad=max_bad)


@pytest.mark.parametrize("size", [2, 40_000])
def test_an_object_over_many_lines_is_one_mistake(tmp_path, size):
    path = tmp_path / "data"
    path.write_text(json.dumps({"v": 1, "data": [alpaca()] * size}, indent=2))
    with pytest.raises(InputError) as error:
        open_files([path], max_bad=None)
    what, why, fix = str(error.value).splitlines()
    assert what == f"{path} begins with a JSON object over several lines, not with a row"
    assert ("the list under 'data'?" in why) == (size == 2)  # the other's end was not read
    assert "one array" in fix
    path.write_text("\n".join(json.dumps(alpaca(), indent=1) for _ in range(2)))
    with pytest.raises(InputError, match="over several lines"):
        open_files([path])
    path.write_text(json.dumps(alpaca())[:-1] + "\n" + json.dumps(alpaca()))
    assert open_files([path], max_bad=1).bad[0][0] == f"{path}:1"


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "data"
    row = json.dumps(alpaca("今天天气怎么样", "今天天气很好"), ensure_ascii=False)
    path.write_bytes(row.encode("gb18030"))
    with pytest.raises(InputError, match=r"data:1: not UTF-8: byte 18 cannot be read; it may be"):
        open_files([path])
    path.write_bytes(f"[{row},".encode() + row.encode("gb18030") + b"]")
    with pytest.raises(InputError, match=r"1 of 2 rows .*\n.*data, row 2: not UTF-8"):
        open_files([path])


def test_a_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.dataset.DataFile", partial(DataFile, max_row=1000))
    dataset = open_rows(tmp_path / "data", [alpaca("x" * 2000), alpaca()], max_bad=1)
    assert dataset.bad == [(f"{tmp_path / 'data'}:1", "the row is too long to be read: 2035 bytes")]


def test_a_sequence_may_have_the_most_tokens_and_no_more(tmp_path):
    length = int(open_rows(tmp_path / "data", [alpaca()]).lengths[0])
    assert len(open_rows(tmp_path / "data", [alpaca()], max_length=length)) == 1
    why = f"too long: {length} tokens, at most {length - 1}"
    with pytest.raises(InputError, match=why):
        open_rows(tmp_path / "data", [alpaca()], max_length=length - 1)
    row = alpaca("Q" * 40, history=[["Q", "A"]])  # only its second sequence is too long
    dataset = open_rows(tmp_path / "data", [row], max_length=length + 20, max_bad=None)
    assert len(dataset) == 0 and dataset.bad_reasons == {"too long": 1}


def test_a_conversation_without_end_is_encoded_once(tmp_path):
    row = alpaca("Q", history=[["Q", "A"]] * 400)
    with patch.object(Encoder, "encode", autospec=True, side_effect=Encoder.encode) as encode:
        dataset = open_rows(tmp_path / "data", [row], max_bad=None)
    assert dataset.bad_reasons == {"too long": 1} and encode.call_count == 1


def test_a_file_that_mixes_formats_is_refused(tmp_path):
    path = tmp_path / "data"
    rows = [{"x": 1}, alpaca(), alpaca(), ONE["sharegpt"], alpaca()]
    for max_bad in (0, 9, None):
        with pytest.raises(InputError, match="mixes formats\nline 2 is alpaca, line 4 is sharegpt"):
            open_rows(path, rows, max_bad=max_bad)
    rows = [ONE["sharegpt"], CONVERSATIONS[3]]
    with pytest.raises(InputError, match="line 1 is sharegpt, line 2 is messages"):
        open_rows(path, rows)


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
