"""`response_format`: the content of every answer is JSON, or of the schema that was asked for."""

import json
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletion

from infer.batching.options import BatchOptions
from infer.batching.worker import Worker
from infer.serve.options import RequestOptions
from infer.serve.security import Access
from tests.support.engine_toy import toy_engine
from tests.support.serve import Served, chunks, error_of, serving

SCHEMA = {
    "type": "object",
    "properties": {
        "城市": {"type": "string", "minLength": 1, "maxLength": 6},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 1}, "maxItems": 2},
    },
    "required": ["城市", "days"],
    "additionalProperties": False,
}
WANTED = {
    "type": "json_schema",
    "json_schema": {"name": "trip", "description": "d", "strict": True, "schema": SCHEMA},
}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def asked(schema: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.fixture(scope="module", params=["chatglm2", "chatglm3"])
def served(request):
    """A random model whose steps are batched, and whose answers are never right by chance."""
    engine = toy_engine(family=request.param)
    worker = Worker(engine, BatchOptions(slots=4, size=256, tokens_per_prefill=64))
    worker.start()
    yield Served(engine, worker, Access(), RequestOptions(), ())
    worker.stop()


def test_the_content_of_every_choice_matches(served):
    reply = served.chat(response_format=WANTED, n=6, seed=1, max_tokens=100)
    choices = ChatCompletion.model_validate(reply.json()).choices
    done = [choice for choice in choices if choice.finish_reason == "stop"]
    assert len(choices) == 6 and len(done) >= 3
    for choice in done:
        assert choice.message.content is not None and choice.message.tool_calls is None
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


class Trip(pydantic.BaseModel):
    city: Literal["巴黎", "Rome"]
    days: int = pydantic.Field(ge=1, le=99)
    note: str | None = pydantic.Field(max_length=4)


@pytest.mark.filterwarnings("ignore")  # those of the client are not ours
def test_openai_parses_the_answer_into_its_model(served):
    messages: Any = [{"role": "user", "content": "你好"}]
    with (
        served.listening() as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        reply = client.chat.completions.parse(
            model="toy", messages=messages, response_format=Trip, seed=7, max_tokens=150
        )
    assert isinstance(reply.choices[0].message.parsed, Trip)


def test_a_stream_has_the_same_content(served):
    body = {"response_format": WANTED, "seed": 2, "max_tokens": 120}
    choice = served.chat(**body).json()["choices"][0]
    found = [c["choices"][0] for c in chunks(served.chat(stream=True, **body))]
    text = "".join(one["delta"].get("content") or "" for one in found)
    assert text == choice["message"]["content"]
    assert found[-1]["finish_reason"] == choice["finish_reason"] == "stop"


def test_json_mode_ends_with_the_object_or_the_limit(served):
    body = {"response_format": {"type": "json_object"}, "n": 8, "max_tokens": 60, "seed": 3}
    choices = served.chat(**body).json()["choices"]
    assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}
    for choice in choices:
        text = choice["message"]["content"]
        assert text.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            with pytest.raises(json.JSONDecodeError):
                json.loads(text)


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_object", "schema": {"const": "42"}},
        {"type": "json_object", "json_schema": {"schema": {"const": "42"}}},
        {"type": "json_schema", "schema": {"const": "42"}},
    ],
)
def test_a_schema_is_enforced_wherever_it_stands(served, wanted):
    choice = served.chat(response_format=wanted, max_tokens=30).json()["choices"][0]
    assert json.loads(choice["message"]["content"]) == "42"


def test_answers_without_a_format_stay_as_they_are(served):
    body = {"seed": 4, "max_tokens": 20}
    plain = served.chat(**body).json()["choices"]
    assert served.chat(response_format={"type": "text"}, **body).json()["choices"] == plain
    assert served.chat(response_format=None, **body).json()["choices"] == plain
    with pytest.raises(json.JSONDecodeError):
        json.loads(plain[0]["message"]["content"])


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"response_format": asked({"not": {}})}, 400, "response_format", "Unimplemented keys"),
        ({"response_format": asked({"$ref": "#/no"})}, 400, "response_format", "cannot be"),
        ({"response_format": asked({"enum": ["x" * 70_000]})}, 400, "response_format", "at most"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "needs"),
        ({"response_format": {"type": "xml"}}, 422, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, 422,
         "response_format.json_schema.schema", "required"),
        ({"response_format": WANTED, "tools": TOOLS}, 400, "response_format", "tools"),
        ({"response_format": WANTED, "ignore_eos": True}, 400, "ignore_eos", "ends where"),
        ({"guided_json": SCHEMA}, 400, "guided_json", "response_format"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(body, status, param, says):
    with serving("{}") as served:
        reply = served.chat(**body)
    error = error_of(reply)
    assert (reply.status_code, error["param"]) == (status, param)
    assert says in error["message"] and error["type"] == "invalid_request_error"


def test_completions_have_no_format():
    with serving("{}") as served:
        reply = served.post("/v1/completions", {"prompt": "x", "response_format": WANTED})
    assert reply.status_code == 400 and error_of(reply)["param"] == "response_format"


def test_a_schema_that_no_text_matches_is_an_error_and_not_an_empty_answer(served):
    body = {"response_format": asked({"$ref": "#"})}
    reply = served.chat(**body)
    assert (reply.status_code, error_of(reply)["code"]) == (400, "grammar")
    last = chunks(served.chat(stream=True, **body))[-1]
    assert last["error"]["code"] == "grammar"


def test_tools_are_left_out_of_an_answer_with_a_format(served):
    """With tools in the prompt's history, and `tool_choice` none."""
    body = {"tools": TOOLS, "tool_choice": "none", "response_format": WANTED, "max_tokens": 100}
    choices = served.chat(n=4, seed=5, **body).json()["choices"]
    assert all("tool_calls" not in choice["message"] for choice in choices)
    done = [choice for choice in choices if choice["finish_reason"] == "stop"]
    for choice in done:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert done
