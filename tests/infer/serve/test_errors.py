"""Errors: OpenAI's shape on every path, quickly, and nothing of the program inside."""

import json

import pytest

from infer.serve.options import RequestOptions
from infer.serve.schema import MAX_STRINGS
from tests.support.serve import error_of, serving

CHAT = "/v1/chat/completions"
DEEP = '{"messages":' + "[" * 100_000


@pytest.fixture(scope="module")
def served():
    with serving("ok", options=RequestOptions(queue=8)) as served:
        yield served


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b'{"messages": "\xed\xa0\x80"}', 400),
        (rb'{"messages": [{"role": "user", "content": "\ud800"}]}', 400),
        (DEEP.encode(), 400),
        (b"null", 422),
        (b"[]", 422),
        (b'"text"', 422),
        (b'{"messages": [], "temperature": NaN}', 400),
        (b'{"messages": [], "temperature": ' + b"9" * 10_000 + b"}", 400),
    ],
    ids=lambda value: str(value)[:40],
)
def test_garbage_bodies_are_client_errors(served, body, status):
    headers = {"Content-Type": "application/json"}
    response = served.request("POST", CHAT, content=body, headers=headers)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": -1}, {"temperature": 1e400}, {"temperature": "1"}, {"temperature": True},
        {"top_p": 1.5}, {"top_k": -2}, {"top_k": 2**70}, {"presence_penalty": 3},
        {"repetition_penalty": 0}, {"max_tokens": 0}, {"max_tokens": 1.5}, {"max_tokens": -1},
        {"n": 0}, {"n": 10**9}, {"seed": 2**64}, {"seed": 1.0}, {"stop": ["x"] * 10**6},
        {"stop": ["x"] * (MAX_STRINGS + 1)}, {"stop": "x" * 10_000}, {"stop": 5},
        {"logit_bias": {"1": 1e9}}, {"logit_bias": {str(i): 1 for i in range(301)}},
        {"stop_token_ids": [-1]}, {"stream": "yes"}, {"stream_options": []}, {"top_logprobs": 21},
        {"model": ""}, {"messages": []}, {"messages": [{}] * 10**5}, {"messages": {}},
        {"messages": [{"role": "robot", "content": "x"}]}, {"messages": [{"role": "user"}] * 5000},
        {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, {"tool_choice": "always"},
        {"tools": [{"type": "function", "function": {"name": "a\nb"}}]},
    ],
    ids=lambda more: str(more)[:40],
)  # fmt: skip
def test_fields_out_of_range_are_named(served, more):
    body = {"messages": [{"role": "user", "content": "x"}], **more}
    content = json.dumps(body)
    if "Infinity" in content:
        content = content.replace("Infinity", "1e400")
    headers = {"Content-Type": "application/json"}
    response = served.request("POST", CHAT, content=content, headers=headers)
    assert response.status_code == 422
    error = error_of(response)
    assert error["param"].startswith(next(iter(more))) and len(error["message"]) <= 520


@pytest.mark.parametrize(
    ("path", "more", "says"),
    [
        (CHAT, {"stop": ["x"] * 17}, "stop: expected a text of at most 256 characters, or a list"),
        (CHAT, {"stop": "x" * 257}, "stop: expected a text of at most 256 characters, or a list"),
        (CHAT, {"tool_choice": "always"}, 'tool_choice: expected "none"'),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content: expected a"),
        ("/v1/completions", {"prompt": []}, "prompt: expected a text, a list of 1 to 1024 texts"),
        ("/v1/completions", {"prompt": [[]]}, "prompt: expected a text, a list of 1 to 1024 texts"),
        ("/v1/completions", {"prompt": ["x"] * 1025}, "prompt: expected a text, a list of 1 to"),
        ("/v1/completions", {}, "prompt: Field required"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_rule_of_a_field_with_several_types_is_given_in_words(served, path, more, says):
    body = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {}
    response = served.post(path, {**body, **more})
    assert response.status_code == 422 and error_of(response)["message"].startswith(says)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_json": {}}, "guided_json"), ({"min_p": 0.1}, "min_p"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"), ({"use_beam_search": True}, "use_beam_search"),
        ({"functions": [{}]}, "functions"), ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"), ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ],
)  # fmt: skip
def test_what_would_change_the_text_is_refused_by_name(served, more, param):
    response = served.chat(**more)
    assert response.status_code == 400 and error_of(response)["param"] == param


def test_harmless_and_neutral_fields_are_accepted(served):
    harmless = {
        "user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto",
        "response_format": {"type": "text"}, "min_p": 0.0, "best_of": 1, "suffix": None,
        "parallel_tool_calls": False, "functions": [], "length_penalty": 1.0, "bad_words": [],
    }  # fmt: skip
    response = served.chat(**harmless)
    assert response.status_code == 200 and "x-warning" not in response.headers
    # True is no number: it is not the neutral 1.
    assert error_of(served.chat(length_penalty=True))["param"] == "length_penalty"


def test_unknown_fields_are_reported_or_refused(served):
    response = served.chat(**{"blub\n你": 1, "other": None})
    assert response.headers["x-warning"] == "ignored unknown fields: blub\\\\n\\u4f60, other"
    with serving("ok", options=RequestOptions(strict=True)) as strict:
        error = error_of(strict.chat(other=None))
        assert (error["code"], error["param"]) == ("unknown_parameter", "other")
        message = {"role": "user", "content": "x", "name": "me", "extra": 1}
        error = error_of(strict.post(CHAT, {"messages": [message]}))
        assert (error["code"], error["param"]) == ("unknown_parameter", "messages.extra")
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
            assert strict.post(path, body).status_code == 200
            assert error_of(strict.post(path, {**body, "other": 1}))["param"] == "other"
    message["function_call"] = {"name": "f", "arguments": "{}"}
    assert served.post(CHAT, {"messages": [{**message, "function_call": None}]}).is_success
    error = error_of(served.post(CHAT, {"messages": [message]}))
    assert error["param"] == "messages.function_call" and "tool_calls" in error["message"]
    error = error_of(served.chat(**{f"x{n}": n for n in range(1000)}))
    assert "at most 1000" in error["message"]


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(served):
    limit = served.engine.max_length
    prompt = {"prompt": [[5] * (limit - 4)], "max_tokens": 3}
    error = error_of(served.post("/v1/completions", prompt))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert f"{limit} tokens" in error["message"] and f"({limit - 2} in the" in error["message"]
    assert served.post("/v1/completions", {**prompt, "max_tokens": 2}).status_code == 200
    error = error_of(served.chat("好" * limit))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    error = error_of(served.chat("x" * 1_000_000))  # without encoding all of it
    assert error["code"] == "context_length_exceeded" and "at least" in error["message"]


def test_other_paths_have_error_objects(served):
    for method, path, status, text in (
        ("POST", "/v1/responses", 404, "/v1/chat/completions"),
        ("GET", "/v1/embeddings", 404, "/openapi.json"),
        ("DELETE", "/v1/models", 405, "method"),
        ("GET", "/v1/models/other", 404, "toy"),
        ("GET", "/health?deep=perhaps", 422, "deep"),
        ("GET", "/static/../../app.py", 404, ""),
    ):
        response = served.request(method, path)
        assert response.status_code == status and text in error_of(response)["message"]
    for path, methods in (
        ("/v1/models", "GET"), ("/", "GET, HEAD, POST"), ("/health", "GET, HEAD"),
        ("/static/x", "GET, HEAD"), (CHAT, "POST"),
    ):  # fmt: skip
        assert served.request("DELETE", path).headers["allow"] == methods
    assert error_of(served.chat(model="gpt-4o"))["code"] == "model_not_found"
    response = served.request("POST", CHAT, content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415 and "application/json" in error_of(response)["message"]
    assert (
        error_of(served.post("/v1/completions", {"prompt": [[10**6]]}))["code"] == "invalid_value"
    )
    too_many = error_of(served.post("/v1/completions", {"prompt": ["x"] * 4, "n": 3}))
    assert "at most 10" in too_many["message"] and "2 slots" in too_many["message"]


def test_a_full_queue_says_when_to_return():
    with serving("ok", queue=1) as served:
        response = served.chat(n=3)
        assert response.status_code == 429 and error_of(response)["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "2"
        served.worker.drain()  # those of the refused request are gone
        assert served.chat().status_code == 200


def test_a_bug_is_told_without_its_traceback():
    with serving("ok") as served:
        served.worker.job = lambda *args, **kwargs: {}["secret"]
        response = served.chat()
        assert response.status_code == 500 and "secret" not in response.text
        assert error_of(response)["type"] == "server_error"
        del served.worker.job
        assert served.chat().status_code == 200


def test_failures_become_statuses_or_end_the_stream():
    options = RequestOptions(request_timeout=1e-6)
    with serving("ok", options=options) as served:
        response = served.chat()
        assert response.status_code == 504 and error_of(response)["code"] == "deadline"
        stream = served.chat(stream=True)
        lines = [line for line in stream.text.split("\n") if line.startswith("data: ")]
        assert json.loads(lines[-2][6:])["error"]["code"] == "deadline"
        assert lines[-1] == "data: [DONE]"


def test_the_model_that_fails_fails_one_request_alone():
    def script(row):
        yield 7
        if row.draw == 1:
            raise RuntimeError("the device has gone")
        yield 2

    with serving("ok") as served:
        served.worker.script = script
        response = served.chat(n=2)
        assert response.status_code == 500 and error_of(response)["code"] == "device"
        assert served.chat().status_code == 200
