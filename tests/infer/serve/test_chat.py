"""/v1/chat/completions: answers and streams in the shape that OpenAI's client reads."""

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from infer.serve.messages import rounds, with_roles
from infer.serve.schema import ChatBody
from tests.support.serve import chunks, error_of, serving

HELLO = "你好！很高兴见到你\x85\u2028。"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = "weather\n```python\ntool_call(city='巴黎', days=2)\n```"


def test_an_answer_has_the_shape_of_openai():
    with serving(HELLO) as served:
        first = served.chat(seed=-5, user="me", store=True, n=2)
        again = served.chat(max_completion_tokens=2, max_tokens=9)
    answer = ChatCompletion.model_validate(first.json())
    assert [choice.message.content for choice in answer.choices] == [HELLO, HELLO]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert (answer.model, answer.object) == ("toy", "chat.completion")
    assert answer.system_fingerprint == "fp_ffffffffffffffff" and answer.usage is not None
    prompt = len(served.engine.build_prompt("你好"))
    written = 2 * len(served.engine.tokenizer.encode(HELLO))
    assert answer.usage.prompt_tokens == prompt  # once for both answers
    assert answer.usage.completion_tokens == written
    assert answer.usage.total_tokens == prompt + written
    answer = ChatCompletion.model_validate(again.json())
    assert answer.choices[0].finish_reason == "length" and answer.usage is not None
    assert answer.usage.completion_tokens == 2 and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == prompt - 1


def test_a_stream_begins_with_the_role_and_ends_with_usage_and_done():
    options = {"include_usage": True, "continuous_usage_stats": True}
    with serving(HELLO) as served:
        response = served.chat(stream=True, n=2, stream_options=options)
        plain = chunks(served.chat(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    found = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks(response)]
    assert len({chunk.id for chunk in found}) == 1
    assert [chunk.choices[0].delta.role for chunk in found[:2]] == ["assistant"] * 2
    *contents, last = found
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens
    assert all(chunk.usage is None for chunk in contents)
    for index in range(2):
        mine = [chunk.choices[0] for chunk in contents if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == HELLO
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert all(chunk["choices"] and "usage" not in chunk for chunk in plain)
    # No character ends a line for clients that split at all that Unicode knows.
    assert len(response.text.splitlines()) == len(response.text.split("\n")) - 1


def test_metrics_count_the_requests_of_clients():
    with serving(HELLO) as served:
        assert served.request("GET", "/health?deep=1").json()["status"] == "ok"
        served.chat(n=2)
        served.worker.drain()
        lines = served.request("GET", "/metrics").text.splitlines()
        assert served.request("HEAD", "/metrics").status_code == 200
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    prompt = 2 * len(served.engine.build_prompt("你好"))
    written = 2 * (len(served.engine.tokenizer.encode(HELLO)) + 1)  # with the end token
    for name, value in {
        "prompt_tokens_total": prompt, "generation_tokens_total": written,
        "time_to_first_token_seconds_count": 2, "inter_token_latency_seconds_count": written - 2,
        "e2e_request_latency_seconds_count": 2, "prefix_cache_queries_total": prompt,
        "num_requests_running": 0, "num_requests_waiting": 0,
    }.items():  # fmt: skip
        assert float(values[f'vllm:{name}{{model_name="toy"}}']) == value, name
    hits = len(served.engine.tokenizer.prefix_ids) + prompt // 2 - 1
    assert float(values['vllm:prefix_cache_hits_total{model_name="toy"}']) == hits


def test_a_stop_string_ends_the_answer():
    with serving("one two three") as served:
        choice = served.chat(stop=[" two", None, ""]).json()["choices"][0]
    assert choice["message"]["content"] == "one"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " two")


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_as_openai_has_it(stream):
    body = {"tools": [WEATHER], "stream": stream}
    written = f"让我看看<|assistant|>{CALL}<|observation|>"
    with serving(written, family="chatglm3") as served:
        response = served.chat("巴黎天气", **body)
    if stream:
        deltas = [c for chunk in chunks(response) for c in chunk["choices"]]
        assert "".join(choice["delta"].get("content") or "" for choice in deltas) == "让我看看"
        first, second = (
            choice["delta"]["tool_calls"][0] for choice in deltas if "tool_calls" in choice["delta"]
        )
        assert first["index"] == second["index"] == 0 and first["type"] == "function"
        assert first["id"].startswith("call_") and first["function"]["name"] == "weather"
        arguments, reason = second["function"]["arguments"], deltas[-1]["finish_reason"]
        assert "id" not in second and all(
            ChatCompletionChunk.model_validate(chunk) for chunk in chunks(response)
        )
    else:
        message = ChatCompletion.model_validate(response.json()).choices[0]
        assert message.message.content == "让我看看" and message.message.tool_calls
        arguments, reason = message.message.tool_calls[0].function.arguments, message.finish_reason
    assert json.loads(arguments) == {"city": "巴黎", "days": 2} and reason == "tool_calls"


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_tool_that_must_be_called_is(stream, choice):
    """The prompt has the beginning of the call, which the model continues."""
    asked = []
    with serving("city='巴黎')\n```<|observation|>", family="chatglm3") as served:
        written = served.worker.script
        served.worker.script = lambda row: asked.append(row.ids) or written(row)
        response = served.chat(tools=[WEATHER], tool_choice=choice, stream=stream)
        begun = served.engine.tokenizer.decode(asked[0][-30:])
        two = [WEATHER, {"type": "function", "function": {"name": "other"}}]
        error = error_of(served.chat(tools=two, tool_choice="required"))
        absent = error_of(served.chat(tools=two[1:], tool_choice=NAMED))
    if stream:
        deltas = [c["delta"] for chunk in chunks(response) for c in chunk["choices"]]
        calls = [delta["tool_calls"][0]["function"] for delta in deltas if "tool_calls" in delta]
        name, arguments = calls[0]["name"], calls[1]["arguments"]
        assert not any(delta.get("content") for delta in deltas)
    else:
        message = response.json()["choices"][0]["message"]
        assert message["content"] is None
        name, arguments = message["tool_calls"][0]["function"].values()
    assert (name, json.loads(arguments)) == ("weather", {"city": "巴黎"})
    assert begun.endswith("weather\n ```python\ntool_call(")
    assert error["param"] == absent["param"] == "tool_choice"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("family", "arguments", "kept"),
    [
        ("chatglm3", "city='巴黎')\n```", 3),
        ("glm4", '{"city": "巴黎"}', 3),
        ("glm4", '{"city": "巴黎"}', None),  # the model might have written on
    ],
)
def test_a_tool_call_that_was_cut_off_shows_what_was_written(family, arguments, kept, stream):
    asked = {"tools": [WEATHER], "tool_choice": NAMED, "stream": stream}
    with serving(arguments, family=family) as served:
        ids = served.engine.tokenizer.encode(arguments)[:kept]
        response = served.chat(**asked, max_tokens=len(ids))
        written = served.engine.tokenizer.decode(ids)
    bodies = chunks(response) if stream else [response.json()]
    choices = [choice for body in bodies for choice in body["choices"]]
    said = [choice["delta" if stream else "message"] for choice in choices]
    called = [call["function"] for one in said for call in one.get("tool_calls") or ()]
    assert not any(one.get("content") for one in said)
    assert called[0]["name"] == "weather" and choices[-1]["finish_reason"] == "length"
    assert "".join(function["arguments"] for function in called) == written != ""


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_arguments_of_a_tool_call_are_finite(number):
    call = {"function": {"name": "weather", "arguments": f'{{"days": {number}}}'}}
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
    with serving(HELLO, family="chatglm3") as served:
        response = served.post("/v1/chat/completions", {"messages": asked})
    assert response.status_code == 400 and "arguments" in error_of(response)["param"]


@pytest.mark.parametrize("stream", [False, True])
def test_code_that_is_no_call_with_literals_stays_text(stream, tmp_path):
    code = f"tool_call(a=open({str(tmp_path / 'run')!r}, 'w'))"
    with serving("weather\n" + code, family="chatglm3") as served:
        response = served.chat(tools=[WEATHER], stream=stream)
        ignored = served.chat(tools=[WEATHER], tool_choice="none").json()
    if stream:
        deltas = [c["delta"] for chunk in chunks(response) for c in chunk["choices"]]
        assert not any("tool_calls" in delta for delta in deltas)
        text = "".join(delta.get("content") or "" for delta in deltas)
    else:
        text = response.json()["choices"][0]["message"]["content"]
    assert text == f"<|assistant|>weather\n{code}"
    assert ignored["choices"][0]["message"]["content"] == text
    assert list(tmp_path.iterdir()) == []


def messages(*pairs, **last):
    bodies = [{"role": role, "content": content} for role, content in pairs]
    bodies[-1] |= last
    return ChatBody.model_validate({"messages": bodies}).messages


def test_messages_become_rounds():
    asked = messages(
        ("system", "Be brief."), ("developer", "In English."), ("user", "A"), ("user", "B"),
        ("assistant", "C"), ("system", "Now loud."), ("user", [{"type": "text", "text": "D"}]),
    )  # fmt: skip
    expected = ("Now loud.\nD", [("A\nB", "C")], "Be brief.\nIn English.")
    assert rounds(asked, []) == expected


def test_messages_become_those_of_chatglm3():
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    call["function"]["arguments"] = json.dumps({"city": "巴黎", "in": None})
    asked = [
        *messages(("developer", "Be brief."), ("user", "?")),
        *messages(("assistant", None), tool_calls=[call]),
        *messages(("tool", "rain")),
    ]
    tools = ChatBody.model_validate({"messages": [{"role": "user"}], "tools": [WEATHER]}).tools
    assert tools is not None
    described, *rest = with_roles(asked, tools, "python")
    assert described["role"] == "system" and described["tools"] == [WEATHER["function"]]
    code = "```python\ntool_call(**{'city': '巴黎', 'in': None})\n```"
    assert rest == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "?"},
        {"role": "assistant", "metadata": "weather", "content": code},
        {"role": "observation", "content": "rain"},
    ]


def test_a_template_without_tools_or_chat_refuses_them():
    with serving(HELLO) as served:
        error = error_of(served.chat(tools=[WEATHER]))
        assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
        image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
        assert "image_url" in error_of(served.chat(image))["message"]
        last = {"messages": [{"role": "assistant", "content": "A"}]}
        assert "last message" in error_of(served.post("/v1/chat/completions", last))["message"]


def test_fields_reach_the_sampler_and_the_defaults_are_openais():
    asked = {
        "temperature": 0.5, "top_p": 0, "top_k": -1, "presence_penalty": 1, "logit_bias": {"7": -5},
        "frequency_penalty": -1, "repetition_penalty": 1.5, "stop_token_ids": [9], "seed": 3,
        "ignore_eos": True, "logprobs": True, "top_logprobs": 2, "loop_stop": 5, "max_tokens": 4,
    }  # fmt: skip
    found = []
    with serving(HELLO) as served:
        served.worker.script = lambda row: found.append(row.sampling) or [7, 7, 7, 7, 2]
        served.chat(**asked)
        served.chat()
        served.chat()
    first, second, third = found
    assert first.top_p < 1e-20 and (first.top_k, first.logprobs, first.max_new_tokens) == (0, 2, 4)
    assert (first.presence_penalty, first.frequency_penalty) == (1, -1)
    assert first.logit_bias == ((7, -5),)
    assert (first.stop_token_ids, first.ignore_eos, first.seed) == ((9,), True, 3)
    assert (second.temperature, second.top_p, second.top_k) == (1, 1, 0)
    assert second.seed != third.seed
