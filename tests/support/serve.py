"""The server's application over a worker of the tests, and ways to call it."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn

from glm2_jax import Tokenizer
from infer.batching.options import BatchOptions
from infer.batching.worker import Worker
from infer.engine.engine import Engine
from infer.engine.rows import Row
from infer.serve.app import build
from infer.serve.options import RequestOptions
from infer.serve.security import Access
from infer.serve.service import Facts, Service
from tests.support.engine_toy import TOY, family_engine, toy_engine
from tests.support.serial_worker import Script, SerialWorker


class Served:
    """An application, and the worker that answers for it."""

    def __init__(self, engine: Engine, worker: Any, access: Access, options, origins):
        self.engine, self.worker = engine, worker
        self.service = Service(Facts.of(engine, "f" * 64), worker, {"toy": 0}, options)
        self.app = build(self.service, access, origins)

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """The complete response to a request from this machine, without a socket."""

        async def call() -> httpx.Response:
            app = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=app, base_url="http://localhost") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(call())

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.request("POST", path, json=body)

    def chat(self, text: str = "你好", **more: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **more}
        return self.post("/v1/chat/completions", body)

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        """The URL of the application while it listens on a real socket."""
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@functools.cache
def _engine(family: str) -> Engine:
    if family in ("glm4", "chatglm", "glm"):
        return family_engine(family, 2048)
    return toy_engine(config=dataclasses.replace(TOY, seq_length=2048), family=family)


@contextlib.contextmanager
def serving(
    text: str | None = None,
    *,
    family: str = "chatglm2",
    access: Access | None = None,
    options: RequestOptions | None = None,
    origins: tuple[str, ...] = (),
    queue: int = 1024,
    script: Script | None = None,
) -> Iterator[Served]:
    """A server whose model writes `text`, where role tokens are written as their names, and the end
    token, or the tokens of a script; without them the toy model runs."""
    engine = _engine(family)
    if text is not None:
        script = functools.partial(_tokens, engine.tokenizer, text)
    batch = BatchOptions(slots=2, size=engine.max_length, queue=queue)
    worker = Worker(engine, batch) if script is None else SerialWorker(engine, batch, script=script)
    worker.start()
    try:
        yield Served(engine, worker, access or Access(), options or RequestOptions(), origins)
    finally:
        worker.stop()


def _tokens(tokenizer: Tokenizer, text: str, row: Row) -> list[int]:
    ids = []
    for part in re.split(r"(<\|\w+\|>)", text):
        ids += [tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part)
    # Where the end token is ignored, there has to be another one.
    return [*ids, *[tokenizer.eos_id] * 2048]


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object of a response, whose shape is checked."""
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text and response.headers["x-request-id"]
    return body["error"]
