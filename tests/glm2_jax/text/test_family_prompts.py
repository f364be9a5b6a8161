"""Prompts of GLM-4, ChatGLM-6B and blank filling: published ids, and what is refused."""

import functools
import json

import pytest

from glm2_jax.choices import FAMILIES
from glm2_jax.choices import TEMPLATES as NAMES
from glm2_jax.datasets.encode import Encoder
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.text.prompt import build_followup, build_prompt, stop_ids
from glm2_jax.text.roles import build_messages, message_ids
from glm2_jax.text.template import TEMPLATES
from glm2_jax.text.tokenizer import Tokenizer
from tests.support.shared_data import shared_file, shared_path
from tests.support.sp_model import chatglm_model, sp_model

TOYS = {
    "glm": Tokenizer.from_bytes(sp_model(byte_fallback=False), "glm"),
    "chatglm": Tokenizer.from_bytes(chatglm_model(), "chatglm"),
}
FILES = {"glm4": "glm4_tokenizer", "chatglm": "ice_text", "glm": "cog-pretrain"}


@functools.cache
def real(family):
    path = shared_path(f"glm-family/tokenizers/{FILES[family]}.model")
    return Tokenizer.from_file(path, family)


def reference(name):
    return json.loads(shared_file(f"glm-family/{name}_tokenizer_cases.json") or b"")


def test_every_template_and_family_has_its_row():
    assert tuple(TEMPLATES) == NAMES
    assert {family for one in TEMPLATES.values() for family in one.families} == set(FAMILIES)


def test_glm4_messages():
    cases = reference("glm4")["chat"]
    assert len(cases) == 4
    for case in cases:
        assert build_messages(real("glm4"), case["messages"], "glm4") == case["message_ids"]
    assert build_prompt(real("glm4"), "glm4", "你好") == cases[0]["message_ids"]
    assert stop_ids(real("glm4")) == (151329, 151336, 151338)


def test_glm4_tools_are_a_system_message_of_their_own():
    tokenizer = real("glm4")
    weather = {"name": "get_weather", "description": "天气", "parameters": {"type": "object"}}
    text = (
        "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
        '\n\n## get_weather\n\n{\n    "name": "get_weather",\n    "description": "天气",\n'
        '    "parameters": {\n        "type": "object"\n    }\n}\n'
        "在调用上述函数时，请使用 Json 格式表示调用的参数。"
    )
    system = {"role": "system", "content": text}
    for tools in ([weather], [{"type": "function", "function": weather}]):
        asked = {"role": "system", "content": "Be brief.", "tools": tools}
        (both,) = message_ids(tokenizer, [asked], "glm4")
        apart = [system, {"role": "system", "content": "Be brief."}]
        assert both == sum(message_ids(tokenizer, apart, "glm4"), [])
        asked["content"] = ""
        assert message_ids(tokenizer, [asked], "glm4") == message_ids(tokenizer, [system], "glm4")
    for tools in (weather, [{"description": "no name"}], ["get_weather"]):
        with pytest.raises(InputError, match="tools that are not JSON"):
            message_ids(tokenizer, [{"role": "system", "content": "", "tools": tools}], "glm4")


def test_chatglm_prompts():
    tokenizer, cases = real("chatglm"), reference("chatglm6b")["cases"]
    assert build_prompt(tokenizer, "chatglm", "你好") == [5, 74874, 130001, 130004]
    for query in ("a [MASK] b", "[gMASK]<sop>"):
        ids = build_prompt(tokenizer, "chatglm", query)
        assert ids == [*tokenizer.encode(query), 130001, 130004] and 130000 not in ids
    text = "[Round 0]\n问：你好\n答：你好👋！\n[Round 1]\n问：晚上睡不着应该怎么办\n答："
    ids = build_prompt(tokenizer, "chatglm", "晚上睡不着应该怎么办", [("你好", "你好👋！")])
    assert ids == [*tokenizer.encode(text), 130001, 130004]
    assert stop_ids(tokenizer) == (130005,) and len(cases) == 97
    with pytest.raises(CheckpointError, match="piecewise"):
        build_followup(tokenizer, "Q", 2)
    with pytest.raises(UsageError, match="role ids"):
        build_messages(tokenizer, [{"role": "user", "content": "Q"}], "glm4")


def test_texts_with_blanks():
    tokenizer = real("glm")
    cases = reference("glm_base")["models"]["glm-large-chinese"]["cases"]
    for case in cases:
        if case["text"].strip():
            ids = build_prompt(tokenizer, "fill", case["text"])
            assert ids == [50002, *case["ids"], 50000, 50006]
    with pytest.raises(InputError, match=r"The prompt has \[MASK\] and \[gMASK\]"):
        build_prompt(tokenizer, "fill", "a [MASK] b [gMASK]")
    for history, system in (([("Q", "A")], None), ((), "S")):
        with pytest.raises(InputError, match="fill template takes neither history"):
            build_prompt(tokenizer, "fill", "a [MASK]", history, system)


@pytest.mark.parametrize(
    ("family", "template", "advice"),
    [("glm", "fill", "into the prompt."), ("chatglm", "raw", "or use the template chatglm.")],
)
def test_only_templates_of_the_family_are_advised(family, template, advice):
    with pytest.raises(InputError) as caught:
        build_prompt(TOYS[family], template, "Q", (), "S")
    assert caught.value.fix.endswith(advice)


def test_a_row_with_blanks_takes_no_system_text():
    messages = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    with pytest.raises(InputError, match="takes no system text"):
        Encoder(TOYS["glm"], "fill").encode(messages, 0)


def learned_of(encoder, messages):
    assert encoder.count(messages) == 1
    ids, learned = encoder.encode(messages, 0)
    return ids, [token for token, one in zip(ids, learned, strict=True) if one]


def test_rows_of_training():
    def talk(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    chatglm, glm, glm4 = (real(family) for family in ("chatglm", "glm", "glm4"))
    ids, learned = learned_of(Encoder(chatglm, "chatglm"), talk("你好", "hello"))
    pair = reference("chatglm6b")["pair"]
    assert ids == pair["ids"] and learned == pair["ids"][3:]  # <sop> is learned, too
    ids, learned = learned_of(Encoder(glm, "fill"), talk("中国的首都是[MASK]。", "北京"))
    answer = glm.encode("北京")
    assert ids == [50002, 576, 7114, 48, 50003, 471, 50000, 50006, *answer, 50007]
    assert learned == [*answer, 50007]
    with pytest.raises(UsageError, match="--train-on-prompt is not supported for a chatglm"):
        Encoder(chatglm, "chatglm", train_on_prompt=True)

    system = {"role": "system", "content": "S", "tools": [{"name": "f"}]}
    messages = [system, *talk("x", "y"), *talk("z", "w")]
    ids, learned = learned_of(Encoder(glm4, "glm4"), messages)
    user, assistant = glm4.special["<|user|>"], glm4.special["<|assistant|>"]
    assert ids == [*build_messages(glm4, messages, "glm4")[:-1], 151329]
    line = glm4.encode("\n")
    assert learned == [*line, *glm4.encode("y"), user, *line, *glm4.encode("w"), 151329]
    assert ids.count(assistant) == 2 and ids.count(glm4.special["<|system|>"]) == 2
