"""Rows of every format as sequences: the ids that inference sees, and what is wrong with a row."""

import json
from functools import partial
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.errors import GLMError, InputError, UsageError
from glm2_jax.prompt import build_messages, build_prompt
from tests.fuzz_inputs import damaged
from tests.training_data import GLM2, GLM3, open_files, open_rows, write_rows
from train.data.encode import Encoder
from train.data.index import DataFile

TURNS = (("你好", "你好👋！"), ("What is it?", "A test."), ("为什么？", " 因为\n  有两行。"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(str.strip)


def alpaca(query="Q", answer="A", **more):
    return {"instruction": query, "output": answer, **more}


def sharegpt(*entries, **more):
    return {"conversations": [{"from": f, "value": v} for f, v in entries], **more}


def role_messages(*entries, key="messages"):
    return {key: [{"role": role, "content": content} for role, content in entries]}


def learned_of(sample):
    return [i for i, learned in zip(sample.ids, sample.learned, strict=True) if learned]


def answer_ids(tokenizer, answer):
    return [*tokenizer.encode(answer), tokenizer.eos_id]


ONE = {
    "alpaca": {"instruction": "问：1+1", "input": "等于几？", "output": "2", "system": "Be brief."},
    "sharegpt": sharegpt(("human", "问：1+1\n等于几？"), ("gpt", "2"), system="Be brief."),
    "messages": role_messages(
        ("system", "Be brief."), ("user", "问：1+1\n等于几？"), ("assistant", "2")
    ),
}


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("fmt", ONE)
def test_formats_of_one_question(tmp_path, fmt, auto, array):
    path = tmp_path / "data"
    dataset = open_rows(path, [ONE[fmt]], array=array, fmt="auto" if auto else fmt)
    sample = dataset.sample(0)
    prompt = build_prompt(GLM2, "chatglm2", "问：1+1\n等于几？", (), "Be brief.")
    assert sample.ids == prompt + answer_ids(GLM2, "2")
    assert learned_of(sample) == answer_ids(GLM2, "2") and not any(sample.learned[: len(prompt)])
    assert sample.source == f"{path}:1" and dataset.files[0][2] == fmt
    assert dataset.lengths.tolist() == [len(sample.ids)] and len(dataset) == 1
    assert dataset.learned.tolist() == [sum(sample.learned)]


def test_adgen(tmp_path):
    dataset = open_rows(tmp_path / "data", [{"content": "类型#裙", "summary": "好看的裙子"}])
    prompt = build_prompt(GLM2, "chatglm2", "类型#裙")
    assert dataset.sample(0).ids == prompt + answer_ids(GLM2, "好看的裙子")
    assert dataset.files[0][2] == "adgen"


CONVERSATIONS = [
    alpaca(*TURNS[2], history=[list(turn) for turn in TURNS[:2]], system="S"),
    sharegpt(
        *((f, t) for turn in TURNS for f, t in zip(("human", "gpt"), turn, strict=True)), system="S"
    ),
    role_messages(
        ("system", "S"),
        *((r, t) for turn in TURNS for r, t in zip(("user", "assistant"), turn, strict=True)),
    ),
    role_messages(
        ("system", "S"),
        *((r, t) for turn in TURNS for r, t in zip(("user", "assistant"), turn, strict=True)),
        key="conversations",
    ),
]


@pytest.mark.parametrize("row", CONVERSATIONS)
def test_every_answer_follows_the_prompt_that_inference_gives_it(tmp_path, row):
    dataset = open_rows(tmp_path / "data", [row])
    assert len(dataset) == len(TURNS)
    for number, (question, answer) in enumerate(TURNS):
        prompt = build_prompt(GLM2, "chatglm2", question, TURNS[:number], "S")
        sample = dataset.sample(number)
        assert sample.ids == prompt + answer_ids(GLM2, answer)
        assert sample.learned == [False] * len(prompt) + [True] * len(answer_ids(GLM2, answer))
        assert sample.source.endswith(":1")


@pytest.mark.parametrize("row", CONVERSATIONS)
def test_a_chatglm3_conversation_is_a_sequence(tmp_path, row):
    dataset = open_rows(tmp_path / "data", [row], tokenizer=GLM3, template="chatglm3")
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


def test_chatglm3_tools(tmp_path):
    messages = [
        {"role": "system", "content": "Use tools.", "tools": [{"name": "天气"}]},
        {"role": "user", "content": "天气"},
        {"role": "assistant", "metadata": "get_weather", "content": "tool_call(city='x')"},
        {"role": "observation", "content": "晴"},
        {"role": "assistant", "content": "今天晴。"},
    ]
    row = {"messages": messages}
    dataset = open_rows(tmp_path / "data", [row], tokenizer=GLM3, template="chatglm3")
    sample = dataset.sample(0)
    ends = GLM3.special["<|observation|>"], GLM3.eos_id
    answers = [
        [*GLM3.encode("get_weather\n"), *GLM3.encode("tool_call(city='x')"), ends[0]],
        [*GLM3.encode("\n"), *GLM3.encode("今天晴。"), ends[1]],
    ]
    assert sample.ids == build_messages(GLM3, messages)[:-1] + [GLM3.eos_id]
    assert learned_of(sample) == answers[0] + answers[1]
    with pytest.raises(InputError, match="message 1 has metadata or tools: chatglm2 cannot"):
        open_rows(tmp_path / "data", [row])


def test_raw_text_and_its_continuation(tmp_path):
    rows = [alpaca("def main():\n", "    pass")]
    sample = open_rows(tmp_path / "data", rows, template="raw").sample(0)
    assert sample.ids == build_prompt(GLM2, "raw", rows[0]["instruction"]) + answer_ids(
        GLM2, "    pass"
    )
    for more in ({"system": "S"}, {"history": [["Q", "A"]]}):
        with pytest.raises(InputError, match="raw template takes neither"):
            open_rows(tmp_path / "data", [alpaca(**more)], template="raw")


@pytest.mark.parametrize(("tokenizer", "template"), [(GLM2, "chatglm2"), (GLM3, "chatglm3")])
def test_the_prompt_can_be_learned_too(tmp_path, tokenizer, template):
    options = {"tokenizer": tokenizer, "template": template}
    plain = open_rows(tmp_path / "data", CONVERSATIONS[:1], **options)
    both = open_rows(tmp_path / "data", CONVERSATIONS[:1], train_on_prompt=True, **options)
    for number in range(len(plain)):
        ids = plain.sample(number).ids
        assert both.sample(number).ids == ids
        assert both.sample(number).learned == [False] * 2 + [True] * (len(ids) - 2)
    assert (both.learned == both.lengths - 2).all()


@settings(deadline=None, database=None, max_examples=100)
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


DEEP = '{"instruction":' * 200 + "1" + "}" * 200
BAD_ROWS = [
    ("{", "not JSON: Expecting property name"),
    ("3", "not a JSON object"),
    ('"text"', "not a JSON object"),
    ("null", "not a JSON object"),
    (DEEP, "not JSON that can be read: it is nested too deeply"),
    ('{"instruction": 1%s}' % ("0" * 5000), "not JSON"),
    ('{"instruction": "Q", "output": "A", "output": "B"}', "the key 'output' is there twice"),
    ("{}", "no known format, its keys are none"),
    ({"question": "Q", "answer": "A"}, "no known format, its keys are 'question', 'answer': there"),
    (
        alpaca() | role_messages(("user", "Q"), ("assistant", "A")),
        "it has the keys of alpaca and messages",
    ),
    (alpaca(query=""), "instruction is empty"),
    (alpaca(query=" \n", input="\u3000"), "instruction is empty"),
    (alpaca(answer=""), "output is empty"),
    (alpaca(answer=" \n"), "output is empty"),
    (alpaca(answer=None), "output is not a string: it is of type NoneType"),
    (alpaca(query=5), "instruction is not a string: it is of type int"),
    (alpaca(query=["Q"]), "instruction is not a string: it is of type list"),
    (alpaca(input=True), "input is not a string: it is of type bool"),
    (alpaca(system={}), "system is not a string: it is of type dict"),
    (alpaca(answer="\ud800"), "Character 1 of the text is a lone surrogate"),
    (alpaca(history="Q"), "the history is not a list"),
    (alpaca(history=[["Q"]]), "turn 1 of the history"),
    (alpaca(history=[["Q", "A"], ["", "A"]]), "message 3 (user) is empty"),
    (alpaca(history=[["Q", ""]]), "message 2 (assistant) is empty"),
    (alpaca(tools=[]), "tools stand beside the messages"),
    ({"content": 1, "summary": "A"}, "content is not a string"),
    ({"content": "Q", "summary": ""}, "summary is empty"),
    ({"conversations": []}, "the conversation does not begin with a question"),
    ({"conversations": "Q"}, "conversations is not a list of objects"),
    ({"conversations": ["Q", "A"]}, "conversations is not a list of objects"),
    (sharegpt(("human", "Q")), "the conversation does not end with an answer"),
    (sharegpt(("gpt", "A")), "the conversation does not begin with a question"),
    (sharegpt(("human", "Q"), ("bot", "A")), "message 2 is from 'bot': there are human"),
    (sharegpt(("human", "Q"), (["gpt"], "A")), "message 2 is from ['gpt']"),
    (sharegpt(("human", "Q"), ("gpt", 1)), "message 2 has no text in its value"),
    (sharegpt(("human", "Q"), ("gpt", "")), "message 2 (assistant) is empty"),
    (sharegpt(("human", "Q"), ("human", "Q"), ("gpt", "A")), "message 2 is of the role user"),
    (
        sharegpt(("system", "S"), ("system", "S"), ("human", "Q"), ("gpt", "A")),
        "message 2 (system) is not the first",
    ),
    (
        sharegpt(("human", "Q"), ("observation", "O"), ("gpt", "A")),
        "message 2 is of the role observation",
    ),
    (role_messages(("user", "Q"), ("tool", "A")), "message 2 has the role 'tool'"),
    (role_messages(("user", "Q"), ("assistant", None)), "message 2 (assistant) has no text"),
    (role_messages(("system", " "), ("user", "Q"), ("assistant", "A")), "message 1 (system) is em"),
    ({"messages": [{"role": "user", "text": "Q"}]}, "message 1 has an unknown key: 'text'"),
    ({"messages": [{"role": {}, "content": "Q"}]}, "message 1 has the role {}"),
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
    assert notes[1] == f"{path}:3: instruction is empty"
    assert notes[3] == "3 of 5 rows cannot be used and are left out"
    assert dataset.bad_reasons["not JSON"] == 2


def test_every_row_bad(tmp_path):
    with pytest.raises(InputError, match="data has no row that can be learned from\nthe first is"):
        open_rows(tmp_path / "data", [alpaca(""), "x"], max_bad=99)


def test_many_bad_rows_are_told_with_their_number(tmp_path):
    notes = []
    with pytest.raises(InputError, match="30 of 31 rows"):
        open_rows(tmp_path / "data", [alpaca(), *["x"] * 30], on_note=notes.append)
    assert len(notes) == 21 and notes[-1] == "... and 10 more bad rows"


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "data"
    row = json.dumps(alpaca("今天天气怎么样", "今天天气很好"), ensure_ascii=False)
    path.write_bytes(row.encode("gb18030"))
    with pytest.raises(InputError, match=r"data:1: not UTF-8: byte 18 cannot be read; GB18030"):
        open_files([path])
    path.write_bytes(f"[{row},".encode() + row.encode("gb18030") + b"]")
    with pytest.raises(InputError, match=r"1 of 2 rows .*\n.*data:1: not UTF-8"):
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


def test_a_file_that_mixes_formats_is_refused(tmp_path):
    path = tmp_path / "data"
    rows = [{"x": 1}, alpaca(), alpaca(), ONE["sharegpt"], alpaca()]
    for max_bad in (0, 9, None):
        with pytest.raises(InputError, match="mixes formats\nline 2 is alpaca, line 4 is sharegpt"):
            open_rows(path, rows, max_bad=max_bad)
    rows = [ONE["sharegpt"], CONVERSATIONS[3]]
    with pytest.raises(InputError, match="line 1 is sharegpt, line 2 is messages"):
        open_rows(path, rows)


def test_files_may_differ_in_format(tmp_path):
    paths = [write_rows(tmp_path / fmt, [row]) for fmt, row in ONE.items()]
    dataset = open_files(paths)
    assert [fmt for _, _, fmt in dataset.files] == list(ONE)
    assert len({tuple(dataset.sample(i).ids) for i in range(3)}) == 1
    assert [dataset.source(i) for i in range(3)] == [f"{path}:1" for path in paths]


def test_keys_that_are_not_used_are_told(tmp_path):
    notes = []
    rows = [alpaca(topic="x"), alpaca(topic="y", id=3), alpaca()]
    dataset = open_rows(tmp_path / "data", rows, on_note=notes.append)
    assert notes == ["keys that are not used: topic (2 rows), id (1 rows)"]
    assert dataset.unused == {"topic": 2, "id": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fmt": "csv"}, "unknown format 'csv' of data\nKnown: auto, alpaca, sharegpt"),
        ({"max_length": 1}, "leaves nothing to learn"),
        ({"weights": [0]}, "a weight above 0"),
        ({"weights": [1, 1]}, "a weight above 0"),
        ({"weights": [float("nan")]}, "a weight above 0"),
        ({"mix": ("x", 1.0)}, "not between 0 and 1"),
        ({"mix": ("x", 0.0)}, "not between 0 and 1"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        open_rows(tmp_path / "data", [alpaca()], **options)


def test_no_file_at_all():
    with pytest.raises(UsageError, match="no data"):
        open_files([])


SEEDS = st.sampled_from([json.dumps(row).encode() for row in (*ONE.values(), *CONVERSATIONS)])


@settings(deadline=None, database=None, max_examples=150)
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


def test_rows_are_read_again_from_their_place(tmp_path):
    rows = [alpaca(f"Question {n}", f"Answer {n}") for n in range(300)]
    for array in (False, True):
        dataset = open_rows(tmp_path / "data", rows, array=array)
        with patch.object(DataFile, "read", autospec=True, side_effect=DataFile.read) as read:
            sample = dataset.sample(250)
        assert GLM2.decode(learned_of(sample)) == "Answer 250"
        [(_, _, size)] = [call.args for call in read.mock_calls]
        assert size <= len(json.dumps(rows[250])) + 1
        dataset.close()


def test_a_row_that_changes_meanwhile_is_refused(tmp_path):
    path = tmp_path / "data"
    dataset = open_rows(path, [alpaca("Q1"), alpaca("Q2")])
    with path.open("r+b") as file:
        file.write(json.dumps(alpaca("Q9")).encode())
    assert dataset.sample(1).ids
    with pytest.raises(InputError, match="data:1 has changed since it was first read"):
        dataset.sample(0)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="data:2 has changed"):
        dataset.sample(1)


def test_the_fingerprint_is_that_of_the_contents(tmp_path):
    first, second = [alpaca("Q1")], [alpaca("Q2")]
    a, b = write_rows(tmp_path / "a", first), write_rows(tmp_path / "b", second)
    copy = write_rows(tmp_path / "copy", first)
    prints = [open_files(paths).fingerprint for paths in ([a], [copy], [b], [a, b], [b, a])]
    assert prints[0] == prints[1] and len(set(prints)) == 4
    mixed = open_files([a], mix=(b, 0.5))
    assert mixed.fingerprint == prints[3] and mixed.files[1][0] == str(b)
