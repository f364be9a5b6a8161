"""The exported tokenizer, as the real AutoTokenizer opens it, against ours and the reference."""

import json
import sys
from functools import partial

import numpy as np
import pytest

from convert.layouts.hf_tokenizer import tokenizer_files
from glm2_jax import Tokenizer
from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.text.prompt import build_prompt
from glm2_jax.text.roles import build_messages
from tests.support.rank_file import rank_file
from tests.support.shared_data import shared_file
from tests.support.sp_model import sp_model, without_dummy_prefix

pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

# Special tokens are recognized in text, as everywhere in transformers, unless
# split_special_tokens=True; the published tokenizer recognizes none.
SPECIAL_IN_TEXT = ["[gMASK]", "[gMASK]sop", "</s>", "a</s>b", "<unk>"]

TALK = [
    {"role": "system", "content": "规则 rules"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好👋！\n sop"},
    {"role": "user", "content": "  sophisticated\npeople"},
]


def opened(folder, tokenizer, template=None):
    """The exported files as transformers opens them by itself."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    files = tokenizer_files(tokenizer, template or tokenizer.family, max_length=512)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"model_type": "glm"}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def toy(family="chatglm2"):
    return Tokenizer.from_bytes(sp_model(), family)


def test_the_reference_cases(tmp_path):
    cases = json.loads(shared_file("tokenizer/tokenizer_cases.json"))
    real = Tokenizer.from_bytes(shared_file("tokenizer/tokenizer.model"))
    theirs = opened(tmp_path, real)
    different = []
    for case in cases:
        plain = theirs(case["text"], add_special_tokens=False, split_special_tokens=True)
        assert plain.input_ids == case["hf_ids"], case["text"]
        assert theirs.decode(case["hf_ids"], skip_special_tokens=True) == case["hf_decode"]
        if theirs(case["text"], add_special_tokens=False).input_ids != case["hf_ids"]:
            different.append(case["text"])
    assert len(cases) == 42 and different == SPECIAL_IN_TEXT
    assert theirs("你好").input_ids == [64790, 64792, 36474, 54591]
    assert theirs("[gMASK]<sop>你好", add_special_tokens=False).input_ids[:2] == [64790, 64792]


def test_random_text_gives_our_ids_and_comes_back(tmp_path):
    random = np.random.default_rng(0)
    ours = toy()
    theirs = opened(tmp_path, ours)
    parts = [*"你好 。 the in g s Paris 12 ▁ 👋 e\u0301".split(), " ", "  ", "\n"]
    for _ in range(300):
        text = "".join(random.choice(parts, random.integers(30)))
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids)


def test_what_every_tokenizer_has(tmp_path):
    ours = toy("chatglm3")
    theirs = opened(tmp_path, ours)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (2, 0, None)
    for name, token_id in ours.special.items():
        written = {"sop": "<sop>", "eop": "<eop>"}.get(name, name)
        assert theirs.convert_tokens_to_ids(written) == token_id
        assert theirs.decode([token_id], skip_special_tokens=True) == ""
    text = "sophisticated people"
    assert theirs(text).input_ids == ours.prefix_ids + ours.encode(text)
    assert theirs("a", "b").input_ids == [*ours.prefix_ids, *ours.encode("a"), *ours.encode("b"), 2]
    batch = theirs(["a", "a b c d"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][0][0] == 0 and batch["input_ids"][0][0] == 0
    half = [*ours.encode("ab")[:-1], 3 + 0xE4]  # of a character
    assert ours.decode(half) == theirs.decode(half)


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_the_chat_template_renders_the_official_prompt(tmp_path, family):
    """With a system text, with two rounds, and with one."""
    ours = toy(family)
    theirs = opened(tmp_path, ours)
    for first in (0, 1, 3):
        system = TALK[0]["content"] if first == 0 else None
        history = [(TALK[1]["content"], TALK[2]["content"])] if first < 3 else []
        expected = build_prompt(ours, family, TALK[3]["content"], history, system)
        found = theirs.apply_chat_template(TALK[first:], add_generation_prompt=True)
        assert found["input_ids"] == expected
    talk = [
        TALK[1],
        {"role": "assistant", "metadata": "weather", "content": "tool_call(city='Paris')"},
        {"role": "observation", "content": "12"},
    ]
    unknown = {"chatglm2": "ChatGLM2 knows user", "chatglm3": "system, user, assistant, obs"}
    if family == "chatglm3":
        found = theirs.apply_chat_template(talk, add_generation_prompt=True)
        assert found["input_ids"] == build_messages(ours, talk)
        talk = [{"role": "tool", "content": "12"}]
    with pytest.raises(Exception, match=unknown[family]):
        theirs.apply_chat_template(talk)


def test_a_tokenizer_without_dummy_prefix(tmp_path):
    ours = Tokenizer.from_bytes(without_dummy_prefix(sp_model()), "codegeex2")
    theirs = opened(tmp_path, ours, "raw")
    text = "# language: Python\n def main():"
    assert theirs(text).input_ids == build_prompt(ours, "raw", text)
    assert theirs.decode(ours.encode(" a")) == " a"
    assert theirs.chat_template is None


def test_when_the_files_are_not_written(monkeypatch):
    ours = toy()
    monkeypatch.setattr(ours, "encode", lambda text: [5])
    with pytest.raises(CheckpointError, match="cannot be written in the HF-native form"):
        tokenizer_files(ours, "chatglm2", max_length=512)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match="pip install tokenizers"):
        tokenizer_files(toy(), "chatglm2", max_length=512)


def test_glm_4_as_transformers_reads_it(tmp_path):
    """Its published tokenizer parses special tokens in a text; ours never does."""
    cases = json.loads(shared_file("glm-family/glm4_tokenizer_cases.json"))
    real = Tokenizer.from_bytes(shared_file("glm-family/tokenizers/glm4_tokenizer.model"), "glm4")
    theirs = opened(tmp_path, real)
    assert len(cases["cases"]) == 97
    for case in cases["cases"]:
        found = theirs(case["text"], add_special_tokens=False).input_ids
        assert found == case["hf_ids"], case["text"]
        if not set(found) & set(real.special.values()):
            assert found == case["ordinary_ids"] == real.encode(case["text"])
    assert (theirs.eos_token_id, theirs.pad_token_id) == (151329, 151329)
    assert theirs.unk_token is None
    assert theirs("你好").input_ids == [151331, 151333, 109377]
    for name, token_id in real.special.items():
        assert theirs.convert_tokens_to_ids(name) == token_id
    talk = [{"role": "user", "content": "你好"}]
    found = theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert found == [151331, 151333, 151336, 198, 109377, 151337]


def test_the_tools_of_glm_4(tmp_path):
    """As an argument or in a system message; calls and results in the words of OpenAI's API."""
    ours = Tokenizer.from_bytes(rank_file(), "glm4")
    render = partial(opened(tmp_path, ours).apply_chat_template, add_generation_prompt=True)
    function = {"name": "weather", "description": "天气", "parameters": {"type": "object"}}
    tool = {"type": "function", "function": function}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
    talk = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "the"},
        {"role": "assistant", "metadata": "weather", "content": '{"city": "北京"}'},
        {"role": "observation", "content": "12"},
    ]
    openai = [
        talk[0],
        {"role": "assistant", "content": "the", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
    ]
    system = {"role": "system", "content": "", "tools": [tool]}
    expected = build_messages(ours, [system, *talk], "glm4")
    assert expected == build_messages(ours, [system | {"tools": [function]}, *talk], "glm4")
    assert len(expected) > 300  # the tools are in it
    for messages, tools in (([system, *talk], None), (talk, [tool]), (openai, [function])):
        assert render(messages, tools=tools)["input_ids"] == expected
    openai[1] = {"role": "assistant", "content": None, "tool_calls": [call["function"]]}
    bare = build_messages(ours, [talk[0], *talk[2:]], "glm4")
    assert render(openai)["input_ids"] == bare
    call["function"]["arguments"] = '{"city": "北京"}'
    assert render(openai)["input_ids"] == bare
    with pytest.raises(Exception, match="system, user, assistant, observation, tool"):
        render([{"role": "root", "content": "12"}])


def test_tokenizers_without_such_a_form():
    cog = Tokenizer.from_bytes(sp_model(byte_fallback=False), "glm")
    with pytest.raises(UsageError, match="of a glm model has no HF-native form"):
        tokenizer_files(cog, "fill", max_length=512)
