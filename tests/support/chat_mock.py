"""A small server for the chat page: the page's files with their headers, and scripted answers."""

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from infer.serve.routes.page import STATIC
from infer.serve.security import PAGE_HEADERS

_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
_USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 34,
    "prompt_tokens_details": {"cached_tokens": 5},
}
Delta = dict[str, Any]


def pieces(text: str, length: int = 7) -> list[str]:
    return [text[i : i + length] for i in range(0, len(text), length)]


class ChatMock:
    """What the server answers, and what it was asked.

    Attributes:
        answers: the answer to a question; any other one is answered with "Answer to QUESTION".
        key: if not empty, what every request needs.
        busy: so many requests are refused with 429 first.
        asked: bodies of the requests for answers, oldest first.
        deaths: so many answers are cut off after their first piece.
        gate: cleared, answers pause after their first piece.
        left: set when a client went away in the middle of an answer.
        address: where it is.

    A question with "endless" gets an answer that never ends, "long" an error, "tool" a tool call;
    "loop" and "cut" end for such reasons.
    """

    def __init__(self, address: str):
        self.address = address
        self.answers: dict[str, str] = {}
        self.key = ""
        self.busy = self.deaths = 0
        self.asked: list[dict[str, Any]] = []
        self.gate, self.left = threading.Event(), threading.Event()
        self.gate.set()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mock: ChatMock

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(status, "application/json", json.dumps(value).encode(), **headers)

    def _send_error(self, status: int, message: str, code: str | None = None, **more: str) -> None:
        error = {"message": message, "type": "x", "param": None, "code": code}
        self._send_json({"error": error}, status, X_Request_Id="r-17", **more)

    def _has_key(self) -> bool:
        if self.mock.key in ("", (self.headers["Authorization"] or "").removeprefix("Bearer ")):
            return True
        self._send_error(401, "Missing or incorrect API key.", "invalid_api_key")
        return False

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self._has_key():
                base = {"id": "chatglm3-6b", "max_model_len": 8192, "parent": None}
                adapter = {"id": "poet", "max_model_len": 8192, "parent": "chatglm3-6b"}
                self._send_json({"object": "list", "data": [base, adapter]})
            return
        path = "static/index.html" if self.path == "/" else self.path.lstrip("/")
        file = STATIC.parent / path
        if not file.is_relative_to(STATIC) or not file.is_file():
            return self._send_error(404, "No such route.")
        self._send(200, _TYPES.get(file.suffix, "text/plain"), file.read_bytes(), **PAGE_HEADERS)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._has_key():
            return
        mock = self.mock
        mock.asked.append(body)
        if mock.busy:
            mock.busy -= 1
            return self._send_error(429, "The queue is full.", "server_busy", Retry_After="1")
        question = body["messages"][-1]["content"]
        if "long" in question:
            message = "The context length is 8192 tokens, but your prompt has 9000."
            return self._send_error(400, message, "context_length_exceeded")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._answer(question, body.get("model", ""))
        except OSError:
            mock.left.set()
            self.close_connection = True

    def _answer(self, question: str, model: str) -> None:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": model}
        for choice in self._choices(question):
            if choice is None:  # dies
                self.close_connection = True
                return
            self._event(json.dumps({**head, "choices": [choice], "usage": None}))
        self._event(json.dumps({**head, "choices": [], "usage": _USAGE}))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _choices(self, question: str) -> Iterator[dict[str, Any] | None]:
        yield _choice({"role": "assistant", "content": ""})
        if "tool" in question:
            for delta in _tool_deltas():
                yield _choice(delta)
            yield _choice({}, "tool_calls")
            return
        for number, piece in enumerate(self._pieces(question)):
            if number == 1:
                self.mock.gate.wait(20)
            if number == 1 and self.mock.deaths:
                self.mock.deaths -= 1
                yield None
            yield _choice({"content": piece})
        loop = {"stop_reason": "loop"} if "loop" in question else {}
        yield _choice({}, "length" if loop or "cut" in question else "stop") | loop

    def _pieces(self, question: str) -> Iterable[str]:
        if "endless" in question:
            return iter(lambda: "on " if self._wait() else "", None)
        return pieces(self.mock.answers.get(question, f"Answer to {question}."))

    def _wait(self) -> bool:
        threading.Event().wait(0.02)
        return True

    def _event(self, data: str) -> None:
        content = f": ping\n\ndata: {data}\n\n".encode()
        half = len(content) // 2  # also in the middle of a character
        for part in (content[:half], content[half:]):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            self.wfile.flush()


def _choice(delta: Delta, reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


def _tool_deltas() -> Iterator[Delta]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    yield {"tool_calls": [{"index": 0, **call}]}
    for part in ('{"city": ', '"Beijing"}'):
        yield {"tool_calls": [{"index": 0, "function": {"arguments": part}}]}


@contextmanager
def chat_mock() -> Iterator[ChatMock]:
    """Run the server on a free port."""
    handler = type("BoundHandler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.mock = mock = ChatMock(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield mock
    finally:
        mock.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
