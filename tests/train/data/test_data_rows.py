"""Rows of every format as sequences: the ids that inference sees, and what is wrong with a row."""

import json
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.errors import InputError
from glm2_jax.text.prompt import build_messages, build_prompt
from infer.datasets.encode import Encoder
from infer.datasets.index import DataFile
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
    write_rows,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(str.strip)


@pytest.mark.parametrize(("auto", "array"), [(True, False), (False, True)])
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


def test_chatglm3_tools(tmp_path):
    messages = [
        {"role": "system", "content": "Use tools.", "tools": [{"name": "天气"}]},
        {"role": "user", "content": "天气"},
        {"role": "assistant", "metadata": "get_weather", "content": "tool_call(city='x')"},
        {"role": "observation", "content": "晴"},
        {"role": "assistant", "content": "今天晴。"},
    ]
    row = {"messages": messages}
    dataset = open_rows(tmp_path / "data", [row], **CHATGLM3)
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


def test_chatglm3_messages_without_text(tmp_path):
    call = {"role": "assistant", "metadata": "search", "content": ""}
    asked, last = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    messages = [
        {"role": "system", "content": "", "tools": [{"name": "search"}]}, asked, call,
        {"role": "observation", "content": ""}, last,
    ]  # fmt: skip
    rows: list[tuple[dict[str, Any], str]] = [
        ({"messages": messages}, "A"),
        (alpaca("Q2", "B", history=[["Q1", [call, last]]]), "B"),
    ]
    for row, answer in rows:
        learned = learned_of(open_rows(tmp_path / "data", [row], **CHATGLM3).sample(0))
        assert learned[: len(GLM3.encode("search\n"))] == GLM3.encode("search\n")
        assert learned[-1 - len(GLM3.encode(answer)) :] == [*GLM3.encode(answer), GLM3.eos_id]
    row = {"messages": [asked, {"role": "assistant", "content": "", "loss": False}, asked, last]}
    learned = learned_of(open_rows(tmp_path / "data", [row], **CHATGLM3).sample(0))
    assert learned == [*GLM3.encode("\n"), *GLM3.encode("A"), GLM3.eos_id]
    for answer in (" ", [{"role": "assistant", "content": ""}], [{"role": "tool"}], [{}], [5]):
        bad = [alpaca(history=[["Q", answer]])]
        assert open_rows(tmp_path / "data", bad, max_bad=None, **CHATGLM3).num_bad == 1


def test_raw_text_and_its_continuation(tmp_path):
    rows = [alpaca("def main():\n", "    pass")]
    sample = open_rows(tmp_path / "data", rows, template="raw").sample(0)
    assert sample.ids == build_prompt(GLM2, "raw", rows[0]["instruction"]) + answer_ids(
        GLM2, "    pass"
    )
    for more in ({"system": "S"}, {"history": [["Q", "A"]]}):
        with pytest.raises(InputError, match="raw template takes neither"):
            open_rows(tmp_path / "data", [alpaca(**more)], template="raw")


@pytest.mark.parametrize("options", [{}, CHATGLM3], ids=["chatglm2", "chatglm3"])
def test_the_prompt_can_be_learned_too(tmp_path, options):
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


def test_files_may_differ_in_format(tmp_path):
    paths = [write_rows(tmp_path / fmt, [row]) for fmt, row in ONE.items()]
    dataset = open_files(paths)
    assert [fmt for _, _, fmt in dataset.files] == list(ONE)
    assert len({tuple(dataset.sample(i).ids) for i in range(3)}) == 1
    assert [dataset.source(i) for i in range(3)] == [f"{path}:1" for path in paths]


def test_rows_are_read_again_from_their_place(tmp_path):
    rows = [alpaca(f"Question {n}", f"Answer {n}") for n in range(300)]
    for array in (False, True):
        dataset = open_rows(tmp_path / "data", rows, array=array)
        with patch.object(DataFile, "read", autospec=True, side_effect=DataFile.read) as read:
            sample = dataset.sample(250)
        assert GLM2.decode(learned_of(sample)) == "Answer 250"
        [(_, _, size)] = [call.args for call in read.mock_calls]
        assert size <= len(json.dumps(rows[250])) + 1


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
