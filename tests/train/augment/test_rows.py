"""The user's texts of rows in every format, and the checker of a model's wordings."""

import json

import pytest

from glm2_jax import InputError
from glm2_jax.datasets.formats import read_messages, unused_keys
from glm2_jax.datasets.pairs import read_pair
from tests.support.training_data import alpaca, role_messages, sharegpt
from train.augment.checker import Checker, similarity
from train.augment.rows import read_row, with_texts

TALK = (("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2"))
HUMAN = [("human", "U1"), ("gpt", "A1"), ("human", "U2"), ("gpt", "A2")]
ROWS = {  # a row of each kind, with the user's texts
    "alpaca": (alpaca("Q", "A", input="I", history=[["U1", "A1"]], content="C"), ["U1", "I", "Q"]),
    "blank instruction": (alpaca("", "A", input="I"), ["I"]),
    "no instruction": (alpaca(None, "A", input="I"), ["I"]),
    "adgen": ({"content": "Q", "summary": "A", "instruction": "other"}, ["Q"]),
    "prompt": ({"prompt": "[1]", "response": "A"}, ["[1]"]),
    "sharegpt": (sharegpt(*HUMAN, system="S"), ["U1", "U2"]),
    "messages": (role_messages(("system", "S"), *TALK), ["U1", "U2"]),
    "conversations": (role_messages(*TALK, key="conversations"), ["U1", "U2"]),
    "as JSON text": ({"messages": json.dumps(role_messages(*TALK)["messages"])}, ["U1", "U2"]),
    "pair": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, ["Q"]),
    "pair of messages": (
        {"prompt": role_messages(("user", "Q"))["messages"], "chosen": "A", "rejected": "B"}, ["Q"]
    ),
    "complete pair": (
        {
            "chosen": role_messages(("user", "Q"), ("assistant", "A"))["messages"],
            "rejected": role_messages(("user", "Q"), ("assistant", "B"))["messages"],
        },
        ["Q"],
    ),
}  # fmt: skip


def conversations(fields, fmt):
    return read_pair(fields) if fmt == "preference" else (read_messages(fields, fmt),)


@pytest.mark.parametrize("name", ROWS)
def test_only_the_users_texts_change(name):
    fields, texts = ROWS[name]
    before = json.dumps(fields)
    row = read_row("f:3", fields)
    assert row.texts == texts
    new = with_texts(row, {text: f"<{text}>" for text in texts}, "typo")
    assert json.dumps(fields) == before
    assert new["origin"] == {"source": "f:3", "method": "typo"}
    for old, made in zip(conversations(fields, row.format), conversations(new, row.format),
                         strict=True):  # fmt: skip
        assert [m["role"] for m in old] == [m["role"] for m in made]
        for one, other in zip(old, made, strict=True):
            text = one["content"]
            if one["role"] == "user":  # of an input, both lines
                text = "\n".join(f"<{line}>" for line in text.split("\n"))
            assert other == one | {"content": text}
    if row.format != "preference":
        assert "origin" not in set(unused_keys(new, row.format))


def test_a_new_row_keeps_the_first_origin():
    row = read_row("new:7", alpaca("Q", origin={"source": "old:1", "method": "typo"}))
    assert with_texts(row, {})["origin"] == {"source": "old:1", "method": "typo"}
    assert with_texts(row, {}, "swap")["origin"] == {"source": "old:1", "method": "typo+swap"}
    table = read_row("new:7", alpaca("Q", origin='{"source": "old:1"}'))
    assert with_texts(table, {})["origin"] == {"source": "old:1", "method": ""}
    other = read_row("new:7", alpaca("Q", origin="the web"))
    assert with_texts(other, {})["origin"] == {"source": "new:7", "method": ""}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a text", "a plain text has no question"),
        ({"text": "a text"}, "a plain text has no question"),
        ({"question": "Q"}, "no known format"),
        ([1], "not a JSON object"),
        (alpaca(""), "instruction is empty"),
        (alpaca("Q", ""), "output is empty"),
        (sharegpt(("gpt", "A")), "does not begin with a question"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "are the same"),
        (alpaca("\ud800"), "half of a character"),
    ],
)
def test_rows_that_cannot_be_augmented(value, message):
    with pytest.raises(InputError, match=message):
        read_row("f:1", value)


def test_similarity():
    assert similarity("月熊城在哪里？", "月熊城 在哪里") == 1
    assert similarity("abc", "ABC.") == 1 and similarity("abc", "xyz") == 0
    assert similarity("abcd", "abxd") == pytest.approx(1 / 3)
    assert similarity("a", "a") == 1 and similarity("?", "!") == 1


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("月熊城有多少人？", "月熊城的人口有多少？", ""),
        ("月熊城有多少人？", "", "empty"),
        ("月熊城有多少人？", "How many people?", "other language"),
        ("3 个人用几天？", "4 个人要用几天？", "other numbers"),
        ("三个人用几天？", "三百个人要用几天？", "other numbers"),
        ("《三体》是谁写的？", "《三国》是谁写的作品？", "other names"),
        ("用 Python 写程序", "用 Java 写一个程序", "other names"),
        ("Where is Paris now?", "Paris is where now?", ""),
        ("月熊城有多少人？", "今天天气怎么样呢？", "too different"),
        ("月熊城有多少人？", "月熊城有多少人？！", "too similar"),
        ("月熊城有多少人？", "谁在月熊城住？", "near-duplicate"),
    ],
)
def test_what_a_model_writes_is_checked(old, new, reason):
    checker = Checker(0.2, 0.9, [old, "谁在月熊城住"])
    assert checker.reason(old, new) == reason
    if not reason:
        assert checker.reason(old, new) == "near-duplicate"  # the second time
