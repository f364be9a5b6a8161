"""Clients that leave or stall: their requests end within a step, and no other client waits."""

import asyncio
import gc
import itertools
import json

import pytest

from infer.serve import stream
from tests.support.serial_worker import SerialWorker
from tests.support.serve import chunks, serving

CHAT = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
STREAM = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True}).encode()


def scope_of(path: str = "/v1/chat/completions") -> dict:
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    return {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "scheme": "http",
        "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "root_path": "",
        "server": ("127.0.0.1", 8000), "http_version": "1.1", "asgi": {"version": "3.0"},
    }  # fmt: skip


class Client:
    """One request to an application, whose client can leave, or take nothing."""

    def __init__(self, body: bytes, *, stalls: bool = False):
        self._body, self._stalls = [body], stalls
        self.left = asyncio.Event()
        self.messages: asyncio.Queue[dict] = asyncio.Queue()

    async def receive(self) -> dict:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.messages.put_nowait(message)
        if self._stalls and message["type"] == "http.response.body":
            await asyncio.Event().wait()


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def pausing(worker: SerialWorker):
    """A script that has the worker wait after ten tokens, or the answer could end too early."""

    def script(row):
        for count in itertools.count():
            if count == 10:
                worker.gate.clear()
            yield 7

    return script


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["complete", "stream"])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_ends_its_request(body, begun):
    with serving("ok") as served:
        served.worker.script = pausing(served.worker)
        if not begun:
            served.worker.gate.clear()

        async def call() -> None:
            client = Client(body)
            task = asyncio.create_task(served.app(scope_of(), client.receive, client.send))
            await until(lambda: served.worker.status.running)
            if begun and body is STREAM:
                await until(lambda: client.messages.qsize() > 5)
            client.left.set()
            await task
            served.worker.gate.set()
            await until(lambda: served.worker.cancelled == 1)

        asyncio.run(call())
        served.worker.script = lambda row: [7, 2]
        assert served.chat().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream):
    asked = {"prompt": "Hello", "ignore_eos": True, "max_tokens": 1500, "stream": stream}
    with serving() as served:

        async def call() -> None:
            client = Client(json.dumps(asked).encode())
            scope = scope_of("/v1/completions")
            task = asyncio.create_task(served.app(scope, client.receive, client.send))
            await until(lambda: served.worker.status.running)
            client.left.set()
            await task
            await until(lambda: not served.worker.status.running)

        asyncio.run(call())
        ended = served.request("GET", "/metrics").text
    assert "vllm:request_success_total{" not in ended  # it had no complete answer


def test_a_client_that_leaves_the_queue_is_never_answered():
    asked = []
    with serving("ok") as served:
        served.worker.script = lambda row: asked.append(row) or [2]
        served.worker.gate.clear()

        async def call() -> None:
            first, second = Client(CHAT), Client(CHAT)
            tasks = [
                asyncio.create_task(served.app(scope_of(), one.receive, one.send))
                for one in (first, second)
            ]
            await until(lambda: served.worker.status.waiting == 1)
            second.left.set()
            await tasks[1]
            assert served.worker.status.waiting == 0
            served.worker.gate.set()
            await tasks[0]
            assert first.messages.get_nowait()["status"] == 200

        asyncio.run(call())
    assert len(asked) == 1


def test_a_reader_that_stalls_is_dropped_and_holds_up_nobody(monkeypatch, caplog):
    monkeypatch.setattr(stream, "STALLED", 0.05)
    with serving("ok") as served:
        served.worker.script = pausing(served.worker)

        async def call() -> None:
            client = Client(STREAM, stalls=True)
            async with asyncio.timeout(30):
                await served.app(scope_of(), client.receive, client.send)
            served.worker.gate.set()
            await until(lambda: served.worker.cancelled == 1)

        asyncio.run(call())
        assert "a reader took nothing" in caplog.text
        served.worker.script = lambda row: [7, 2]
        assert chunks(served.chat(stream=True))


def test_an_abandoned_stream_holds_nothing():
    """A generator that was left while it held a lock hung every route of a server once."""
    with serving("ok") as served:
        served.worker.script = pausing(served.worker)

        async def call() -> None:
            client = Client(STREAM)
            task = asyncio.create_task(served.app(scope_of(), client.receive, client.send))
            await until(lambda: client.messages.qsize() > 3)
            task.cancel()  # as a server does that is stopped
            with pytest.raises(asyncio.CancelledError):
                await task
            del task
            gc.collect()
            served.worker.gate.set()
            await until(lambda: served.worker.cancelled == 1)
            served.worker.script = lambda row: [7, 2]
            other = Client(CHAT)
            async with asyncio.timeout(30):
                await served.app(scope_of(), other.receive, other.send)
            assert other.messages.get_nowait()["status"] == 200

        asyncio.run(call())
        assert served.request("GET", "/health").status_code == 200


def test_a_stream_that_never_began_is_cancelled():
    with serving("ok") as served:
        served.worker.script = pausing(served.worker)

        async def call() -> None:
            async def send(message: dict) -> None:
                raise OSError("the connection is gone")

            client = Client(STREAM)
            with pytest.raises(OSError, match="gone"):
                await served.app(scope_of(), client.receive, send)
            served.worker.gate.set()
            await until(lambda: served.worker.cancelled == 1)

        asyncio.run(call())


def test_prompts_are_not_logged(caplog):
    caplog.set_level("DEBUG", "infer.serve")
    with serving("the answer") as served:
        served.chat("a secret question")
        served.request("GET", "/health?key=hidden")
    assert "POST /v1/chat/completions 200" in caplog.text and "GET /health" in caplog.text
    assert not any(word in caplog.text for word in ("secret", "the answer", "hidden"))
