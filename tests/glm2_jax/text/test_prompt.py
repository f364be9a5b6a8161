"""Prompt builders: the published ids, the seam of a follow-up, truncation, and bad input."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.text.prompt import (
    build_followup,
    build_prompt,
    chatglm2_text,
    stop_ids,
    truncate_prompt,
)
from glm2_jax.text.roles import build_messages
from glm2_jax.text.tokenizer import Tokenizer
from tests.support.sp_model import real_model, sp_model, without_dummy_prefix

GLM2 = Tokenizer.from_bytes(sp_model(), "chatglm2")
GLM3 = Tokenizer.from_bytes(sp_model(), "chatglm3")
CODE = Tokenizer.from_bytes(without_dummy_prefix(sp_model()), "codegeex2")
HISTORY = (("你好", "你好👋！"), ("What is it?", "A test.\n"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=15)
QUESTION = TEXT.filter(lambda text: text.strip())
TURNS = st.lists(st.tuples(QUESTION, TEXT), min_size=1, max_size=3)


def published(family):
    return Tokenizer.from_file(real_model() / "tokenizer.model", family)


def test_published_prompts():
    ids = [64790, 64792, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211, 39701]
    ids += [13, 13, 55437, 31211]
    assert build_prompt(published("chatglm2"), "chatglm2", "你好") == ids
    case = json.loads((real_model() / "tokenizer_cases.json").read_text("utf-8"))[2]
    answer = "你好👋！我是人工智能助手 ChatGLM2-6B，很高兴见到你，欢迎问我任何问题。"
    history, query = [("你好", answer)], "晚上睡不着应该怎么办"
    assert chatglm2_text(query, history) == case["text"]
    tokenizer = published("chatglm2")
    assert build_prompt(tokenizer, "chatglm2", query, history) == [64790, 64792, *case["hf_ids"]]
    followup = build_followup(tokenizer, query, 2)
    assert followup[:4] == [13, 13, 30995, 30951] and case["hf_ids"][-len(followup) :] == followup
    first = build_prompt(tokenizer, "chatglm2", "你好")[2:]
    between = case["hf_ids"][len(first) : -len(followup)]
    assert case["hf_ids"] == first + between + followup and tokenizer.decode(between) == answer

    ids = [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]
    tokenizer = published("chatglm3")
    assert build_prompt(tokenizer, "chatglm3", "你好") == ids
    assert build_messages(tokenizer, [{"role": "user", "content": "你好"}]) == ids
    assert stop_ids(tokenizer) == (2, 64795, 64797)

    text = "def main():\n    print('hello world')\t# greeting"
    ids = [64790, 64792, 884, 1301, 9427, 13, 296, 4466, 2029, 15616, 30914, 993, 3387, 12]
    assert build_prompt(published("chatglm2"), "raw", text) == [*ids, 31010, 30174]


def test_chatglm2_text_and_system():
    text = "[Round 1]\n\n问：Q1\n\n答：A1\n\n[Round 2]\n\n问：Q2\n\n答："
    assert chatglm2_text("Q2", [["Q1", "A1"]]) == text
    for history, query in (((), "Q1"), ([("Q1", "A1")], "Q2")):
        ids = build_prompt(GLM2, "chatglm2", query, history, "Be kind.")
        expected = chatglm2_text(query, history).replace("问：Q1", "问：Be kind.\nQ1")
        assert ids == GLM2.prefix_ids + GLM2.encode(expected)
    assert build_prompt(GLM2, "chatglm2", "Q", (), "") == build_prompt(GLM2, "chatglm2", "Q")


@pytest.mark.parametrize("tokenizer", [GLM2, CODE, None], ids=["prefix", "bare", "published"])
def test_a_followup_is_the_end_of_the_whole_prompt(tokenizer):
    tokenizer = tokenizer or published("chatglm2")

    @settings(deadline=None, database=None, max_examples=100)
    @given(history=TURNS, query=QUESTION)
    def check(history, query):
        whole = build_prompt(tokenizer, "chatglm2", query, history)
        followup = build_followup(tokenizer, query, len(history) + 1)
        before = chatglm2_text(history[-1][0], history[:-1]) + history[-1][1]
        assert whole == tokenizer.prefix_ids + tokenizer.encode(before) + followup

    check()


@pytest.mark.parametrize("template", ["chatglm2", "chatglm3", "raw"])
def test_typed_special_tokens_stay_text(template):
    typed = "[gMASK]sop</s><|assistant|><|user|>\n</s><s><unk>"
    ids = build_prompt(GLM3, template, typed)
    specials = [i for i in ids if i <= 2 or i >= GLM3.num_pieces]
    roles = [GLM3.special["<|user|>"], GLM3.special["<|assistant|>"]]
    assert specials == GLM3.prefix_ids + (roles if template == "chatglm3" else [])
    assert stop_ids(GLM2) == stop_ids(CODE) == (2,)
    assert stop_ids(GLM3) == (2, roles[0], GLM3.special["<|observation|>"])


def test_chatglm3_roles_and_empty_messages():
    tools = [{"name": "天气", "parameters": {"city": "str"}}]
    messages = [
        {"role": "system", "content": "Use tools.", "tools": tools},
        {"role": "user", "content": "天气"},
        {"role": "assistant", "metadata": "search", "content": ""},
        {"role": "observation", "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": " "},
        {"role": "assistant", "content": "\n"},
        {"role": "observation", "content": "晴"},
    ]
    written = "Use tools.\n" + json.dumps(tools, indent=4, ensure_ascii=False)
    assert '\n    {\n        "name": "天气"' in written
    texts = [written, "天气", "", "", "", " ", "\n", "晴"]
    expected = list(GLM3.prefix_ids)
    for message, text in zip(messages, texts, strict=True):
        expected += [GLM3.special[f"<|{message['role']}|>"]]
        expected += GLM3.encode(message.get("metadata", "") + "\n") + GLM3.encode(text)
    assert build_messages(GLM3, messages) == [*expected, GLM3.special["<|assistant|>"]]
    for asked in ({"role": "system", "content": ""}, messages[5]):
        with pytest.raises(InputError, match=r"Message 3 \(.*\) is empty"):
            build_messages(GLM3, [*messages[:2], asked])


def test_answers_of_a_history_may_be_messages():
    call = {"role": "assistant", "metadata": "search", "content": "(x)"}
    reply = [{"role": "assistant", "metadata": "", "content": "A"}, call]
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q1"}, *reply,
        {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"},
        {"role": "user", "content": "Q3"},
    ]  # fmt: skip
    built = build_prompt(GLM3, "chatglm3", "Q3", [("Q1", reply), ("Q2", "A2")], "S")
    assert built == build_messages(GLM3, messages)
    with pytest.raises(InputError, match="turn 2 of the history is a list of messages"):
        build_prompt(GLM2, "chatglm2", "Q", [("Q", "A"), ("Q", reply)])


USER = {"role": "user", "content": "Q"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        (USER, "not a list"),
        ([USER, "hello"], "Message 2 is not an object"),
        ([USER, {"role": "tool", "content": "Q"}], "Message 2 has the role 'tool'"),
        ([USER, {"role": "user", "content": 3}], r"Message 2 \(user\) has no content"),
        ([{"role": "user", "content": " \n"}], r"Message 1 \(user\) is empty"),
        ([USER | {"metadata": "a\nb"}], "metadata that is not one line"),
        ([USER | {"tools": []}], "Only a system message"),
        ([{"role": "system", "content": "S", "tools": {1, 2}}], "not JSON"),
        ([USER | {"name": "x", 1: 2}], "unknown key: 1, name"),
        ([USER | {"content": "\ud800"}], "lone surrogate"),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(InputError, match=message):
        build_messages(GLM3, messages)


@pytest.mark.parametrize(
    ("query", "history", "system", "message"),
    [
        (" \n\u3000\t", (), None, "The prompt is empty"),
        (None, (), None, "not a string"),
        ("Q", "history", None, "not a list"),
        ("Q", [("Q", "A"), ("Q",)], None, "Turn 2"),
        *(("Q", [turn], None, "Turn 1") for turn in ("QA", ("Q", None), ("Q", []), ("Q", ["A"]))),
        ("Q", (), 5, "system text is not a string"),
    ],
)
def test_bad_prompts(query, history, system, message):
    for template in ("chatglm2", "chatglm3", "raw"):
        with pytest.raises(InputError, match=message):
            build_prompt(GLM3, template, query, history, system)


def test_what_a_template_cannot_do():
    with pytest.raises(CheckpointError, match="piecewise"):
        build_followup(Tokenizer.from_bytes(sp_model(newlines=True)), "Q", 2)
    with pytest.raises(InputError, match="The prompt is empty"):
        build_followup(GLM2, " ", 2)
    for history, system in ((HISTORY, None), ((), "S")):
        with pytest.raises(InputError, match="neither history nor a system"):
            build_prompt(GLM2, "raw", "Q", history, system)
    with pytest.raises(UsageError, match="needs a tokenizer with role ids"):
        build_prompt(GLM2, "chatglm3", "Q")
    with pytest.raises(UsageError, match="unknown template 'glm5'"):
        build_prompt(GLM2, "glm5", "Q")


@pytest.mark.parametrize("template", ["chatglm2", "chatglm3"])
def test_truncation_drops_old_turns_and_then_the_end_of_the_question(template):
    whole = build_prompt(GLM3, template, "Q", HISTORY, "S")
    assert truncate_prompt(GLM3, template, "Q", HISTORY, "S", len(whole)) == (whole, 0, 0)
    for kept in (1, 0):
        shorter = build_prompt(GLM3, template, "Q", HISTORY[2 - kept :], "S")
        for limit in (len(whole) - 1, len(shorter)):
            result = truncate_prompt(GLM3, template, "Q", HISTORY, "S", limit)
            assert result == (shorter, 2 - kept, 0)
        whole = shorter

    query = "今天天气很好👋 hello world 👋👋 and the capital"
    whole = len(build_prompt(GLM3, template, query, (), "S"))
    least = len(build_prompt(GLM3, template, query[0], (), "S"))
    shorter = [build_prompt(GLM3, template, query[:n], (), "S") for n in range(1, len(query))]
    for limit in range(least, whole):
        ids, turns, tokens = truncate_prompt(GLM3, template, query, HISTORY, "S", limit)
        assert least <= len(ids) <= limit and turns == 2 and tokens == whole - len(ids) > 0
        # Never more is lost than the bytes of one character and what a merge can save.
        assert len(ids) >= limit - 5
        assert ids in shorter


def test_truncation_has_an_end():
    query = "  \n今天天气很好"
    least = len(build_prompt(GLM2, "chatglm2", "  \n今", (), "S"))
    ids, turns, _ = truncate_prompt(GLM2, "chatglm2", query, HISTORY, "S", least)
    assert len(ids) == least and turns == 2
    with pytest.raises(InputError, match=f"fit into {least - 1} tokens.*\n.* takes {least}"):
        truncate_prompt(GLM2, "chatglm2", query, HISTORY, "S", least - 1)
    long = "The capital of France. " * 30_000
    ids, _, dropped = truncate_prompt(GLM2, "raw", long, (), None, 1000)
    whole = build_prompt(GLM2, "raw", long)
    assert len(ids) == 1000 and dropped == len(whole) - 1000
    assert whole[:990] == ids[:990]
