"""Unmodified clients against a real socket: openai, langchain-openai, litellm, lm-eval."""

import json

import pytest

from tests.infer.serve.test_chat import CALL, HELLO, WEATHER
from tests.support.serve import serving

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the clients are not ours
    pytest.mark.usefixtures("collected"),
]


@pytest.fixture(scope="module")
def url():
    with serving(HELLO) as served, served.listening() as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


ASKED = {"model": "toy", "messages": [{"role": "user", "content": "你好"}]}


def test_openai_answers_and_streams(client):
    answer = client.chat.completions.create(**ASKED, seed=1, max_completion_tokens=50)
    assert answer.choices[0].message.content == HELLO
    pieces = client.chat.completions.create(**ASKED, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == HELLO
    options = {"include_usage": True}
    with client.chat.completions.stream(**ASKED, stream_options=options) as stream:
        final = [event for event in stream if event.type == "content.done"]
        answer = stream.get_final_completion()
    assert final[0].content == answer.choices[0].message.content == HELLO
    assert answer.usage.completion_tokens > 1
    assert client.completions.create(model="toy", prompt="x").choices[0].text
    found = client.completions.create(model="toy", prompt=["x", "y"], stream=True, max_tokens=40)
    assert {piece.choices[0].index for piece in found} == {0, 1}
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"


def test_openai_raises_its_errors(client):
    import openai

    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**ASKED, "model": "other"})
    assert caught.value.code == "model_not_found" and caught.value.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        schema = {"name": "x", "schema": {"not": {}}}
        format = {"type": "json_schema", "json_schema": schema}
        client.chat.completions.create(**ASKED, response_format=format)
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASKED, max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        client.responses.create(model="toy", input="x")


@pytest.fixture(scope="module")
def tool_url():
    with serving(f"{CALL}<|observation|>", family="chatglm3") as served:
        with served.listening() as url:
            yield url


def test_openai_calls_tools_and_returns_their_results(tool_url):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{tool_url}/v1", api_key="none") as client:
        message = client.chat.completions.create(**ASKED, tools=[WEATHER]).choices[0].message
        call = message.tool_calls[0]
        assert json.loads(call.function.arguments) == {"city": "巴黎", "days": 2}
        with client.chat.completions.stream(**ASKED, tools=[WEATHER]) as stream:
            done = [event for event in stream if event.type.endswith("arguments.done")]
        assert (done[0].name, done[0].arguments) == ("weather", call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        history = [*ASKED["messages"], message, result]
        client.chat.completions.create(model="toy", messages=history, tools=[WEATHER])


def test_langchain(url, tool_url):
    langchain = pytest.importorskip("langchain_openai")

    def model(base: str):
        return langchain.ChatOpenAI(
            base_url=f"{base}/v1", api_key="none", model="toy", max_tokens=99
        )

    assert model(url).invoke("你好").content == HELLO
    assert "".join(piece.content for piece in model(url).stream("你好")) == HELLO
    called = model(tool_url).bind_tools([WEATHER]).invoke("你好").tool_calls
    assert [(call["name"], call["args"]["city"]) for call in called] == [("weather", "巴黎")]


def test_litellm(url):
    litellm = pytest.importorskip("litellm")
    where = {"model": "openai/toy", "api_base": f"{url}/v1", "api_key": "none"}
    answer = litellm.completion(**where, messages=ASKED["messages"], temperature=0)
    assert answer.choices[0].message.content == HELLO
    pieces = litellm.completion(**where, messages=ASKED["messages"], stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == HELLO
