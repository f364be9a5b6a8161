"""Chats of GLM-4, whose tool calls are JSON, and of ChatGLM-6B, which has no prefix to keep."""

import json

import pytest

from glm2_jax.text.prompt import build_prompt
from glm2_jax.text.roles import build_messages
from tests.support.serve import chunks, error_of, serving

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object"}},
}
ARGUMENTS = {"city": "巴黎", "days": 2}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
NAMED = {"type": "function", "function": {"name": "weather"}}


def calls_of(response, stream):
    """The content, the (name, arguments) of each call, and why the answer ended."""
    if not stream:
        (choice,) = response.json()["choices"]
        functions = [call["function"] for call in choice["message"].get("tool_calls", ())]
        found = [(one["name"], one["arguments"]) for one in functions]
        return choice["message"]["content"] or "", found, choice["finish_reason"]
    choices = [choice for chunk in chunks(response) for choice in chunk["choices"]]
    deltas = [choice["delta"] for choice in choices]
    parts = [delta["tool_calls"][0]["function"] for delta in deltas if "tool_calls" in delta]
    found = [
        (name["name"], rest["arguments"])
        for name, rest in zip(parts[::2], parts[1::2], strict=True)
    ]
    return "".join(d.get("content") or "" for d in deltas), found, choices[-1]["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
def test_glm4_calls_are_json(stream):
    asked = []
    with serving(f"\n让我看看<|assistant|>weather\n{JSON}<|observation|>", family="glm4") as served:
        written = served.worker.script
        served.worker.script = lambda row: asked.append(row.ids) or written(row)
        text, calls, reason = calls_of(served.chat("?", tools=[WEATHER], stream=stream), stream)
    assert (text, reason) == ("让我看看", "tool_calls")
    assert calls == [("weather", JSON)]
    system = {"role": "system", "content": "", "tools": [WEATHER["function"]]}
    messages = [system, {"role": "user", "content": "?"}]
    assert list(asked[0]) == build_messages(served.engine.tokenizer, messages, "glm4")


@pytest.mark.parametrize("stream", [False, True])
def test_a_glm4_call_that_is_demanded_continues_its_name(stream):
    asked = []
    with serving(f"{JSON}<|observation|>", family="glm4") as served:
        written = served.worker.script
        served.worker.script = lambda row: asked.append(row.ids) or written(row)
        body = {"tools": [WEATHER], "tool_choice": NAMED, "stream": stream}
        found = calls_of(served.chat("?", **body), stream)
    assert found == ("", [("weather", JSON)], "tool_calls")
    assert served.engine.tokenizer.decode(asked[0]).endswith("weather\n")


@pytest.fixture(scope="module")
def glm4():
    """A random GLM-4, which would never write JSON by itself."""
    with serving(family="glm4") as served:
        yield served


@pytest.mark.parametrize("stream", [False, True])
def test_the_arguments_of_a_call_that_is_demanded_match_its_schema(glm4, stream):
    city = {"type": "object", "properties": {"city": {"enum": ["巴黎"]}}, "required": ["city"]}
    function = {"name": "weather", "parameters": city | {"additionalProperties": False}}
    tools = [{"type": "function", "function": function}]
    for choice in ("required", NAMED):
        body = {"tools": tools, "tool_choice": choice, "max_tokens": 200, "stream": stream}
        text, calls, reason = calls_of(glm4.chat("?", **body), stream)
        assert (text, reason) == ("", "tool_calls")
        assert [(name, json.loads(found)) for name, found in calls] == [
            ("weather", {"city": "巴黎"})
        ]


def test_a_demanded_call_that_no_schema_can_bind(glm4):
    function = {"name": "weather", "parameters": {"properties": {"a": {"type": "nothing"}}}}
    body = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    assert error_of(glm4.chat("?", **body))["param"] == "tools"
    body = {"tools": [WEATHER], "tool_choice": "required", "ignore_eos": True}
    assert error_of(glm4.chat("?", **body))["param"] == "ignore_eos"


@pytest.mark.parametrize("content", ["not JSON", "[1]", '{"a": 1e999}', '{"a": "\\ud800"}'])
def test_what_is_no_call_stays_text(content):
    with serving(f"weather\n{content}<|observation|>", family="glm4") as served:
        text, calls, reason = calls_of(served.chat("?", tools=[WEATHER]), False)
    assert (text, calls, reason) == (f"<|assistant|>weather\n{content}", [], "stop")


def test_glm4_takes_calls_and_results_back():
    asked = []
    function = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    call = {"id": "1", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "晴"},
    ]
    with serving("\n好", family="glm4") as served:
        written = served.worker.script
        served.worker.script = lambda row: asked.append(row.ids) or written(row)
        answer = served.post("/v1/chat/completions", {"messages": messages}).json()
    assert answer["choices"][0]["message"]["content"] == "好"
    expected = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "metadata": "weather", "content": JSON},
        {"role": "observation", "content": "晴"},
    ]
    assert list(asked[0]) == build_messages(served.engine.tokenizer, expected, "glm4")


def test_chatglm_answers_are_widened_and_prompts_completed():
    asked = []
    with serving("你好,世界!", family="chatglm") as served:
        written = served.worker.script
        served.worker.script = lambda row: asked.append(list(row.ids)) or written(row)
        tokenizer = served.engine.tokenizer
        for stream in (False, True):
            text, calls, reason = calls_of(served.chat("你好", stream=stream), stream)
            assert (text, calls, reason) == ("你好，世界！", [], "stop")
        assert asked.pop() == asked.pop() == [*tokenizer.encode("你好"), *tokenizer.suffix_ids]
        begun = [*tokenizer.encode("a"), *tokenizer.suffix_ids]
        for prompt in ("a", tokenizer.encode("a"), [*begun, 40], begun):
            served.post("/v1/completions", {"prompt": prompt})
        assert asked == [begun, begun, [*begun, 40], begun]
        plain = served.post("/v1/completions", {"prompt": "a"}).json()["choices"][0]["text"]
        assert plain == "你好,世界!"
        scored = {"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 0}
        assert error_of(served.post("/v1/completions", scored))["param"] == "echo"
        assert error_of(served.chat("?", tools=[WEATHER]))["param"] == "tools"


@pytest.mark.parametrize("family", ["glm4", "chatglm"])
def test_a_prompt_without_text_is_one_of_every_family(family):
    """What the server asks its model at its start, and for /health?deep=1."""
    with serving(family=family) as served:
        answered = served.request("GET", "/health?deep=1")
        assert answered.status_code == 200 and answered.json()["status"] == "ok"
        assert served.engine.tokenizer.start_ids


def test_glm_fills_a_blank_or_continues():
    asked = []
    with serving("天气", family="glm") as served:
        written = served.worker.script
        served.worker.script = lambda row: asked.append(list(row.ids)) or written(row)
        tokenizer = served.engine.tokenizer
        for prompt, meant in (("天[sMASK]", "天[sMASK]"), ("天", "天[gMASK]")):
            assert served.post("/v1/completions", {"prompt": prompt}).status_code == 200
            assert served.post("/", {"prompt": prompt}).json()["response"] == "天气"
            assert asked[-1] == asked[-2] == build_prompt(tokenizer, "fill", meant)
        served.post("/v1/completions", {"prompt": ""})
        assert asked[-1] == tokenizer.start_ids
        assert tokenizer.special["[gMASK]"] in tokenizer.start_ids
        for answered in (
            served.post("/v1/completions", {"prompt": "[MASK]天[gMASK]"}),
            served.post("/v1/completions", {"prompt": ["天", "[sMASK][gMASK]"]}),
        ):
            assert answered.status_code == 400 and "one kind" in error_of(answered)["message"]
            assert error_of(answered)["param"] == "prompt"
        assert "/v1/completions" in error_of(served.chat("天[MASK]"))["message"]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("chatglm3", ("ChatGLMTokenizer", "</s>", "<unk>")),
        ("glm4", ("ChatGLM4Tokenizer", "<|endoftext|>", "<|endoftext|>")),
        ("chatglm", ("ChatGLMTokenizer", "<eop>", "<pad>")),
        ("glm", ("GLMChineseTokenizer", "<|endofpiece|>", "<|endoftext|>")),
    ],
)
def test_the_tokenizer_is_described_as_it_is(family, names):
    with serving("a", family=family) as served:
        info = served.request("GET", "/tokenizer_info").json()
        tokenizer = served.engine.tokenizer
    assert (info["tokenizer_class"], info["eos_token"], info["pad_token"]) == names
    assert (info["prefix_ids"], info["suffix_ids"]) == (tokenizer.prefix_ids, tokenizer.suffix_ids)
