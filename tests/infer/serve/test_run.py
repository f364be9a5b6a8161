"""The command: what it refuses before it loads a model, and how it ends."""

import asyncio
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from unittest.mock import Mock

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from infer.serve import __main__ as command
from infer.serve.protocol import HttpProtocol, is_news
from tests.support.commands import exit_code
from tests.support.paths import ROOT

# The server with a worker that writes a token every 20 ms: `count` of them.
SERVER = """
import sys, time
from functools import partial
from glm2_jax.cli import interrupt
from infer.serve import run
from infer.serve.__main__ import main
from tests.support.serial_worker import SerialWorker

def script(row):
    for _ in range(int(sys.argv[-1])):
        time.sleep(0.02)
        yield 60
    yield 2

run.Worker = partial(SerialWorker, script=script)
interrupt.run(lambda args: main(args[:-1]))
"""
ASKED = {"messages": [{"role": "user", "content": "你好"}], "stream": True}


class Process:
    """A server in a process of its own, of which the URL is known."""

    def __init__(self, tokens: int, *flags: str):
        words = [sys.executable, "-c", SERVER, "--port", "0", *flags, str(tokens)]
        self.process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("chat page "):
                break
        self.url = self.lines[-1].split()[2].removesuffix("/,")
        self._reader = threading.Thread(target=self.lines.extend, args=(self.process.stderr,))
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()  # if it has not ended
        self._reader.join()
        self.process.wait()
        self.process.stderr.close()

    def end(self) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        code = self.process.wait(60)
        self._reader.join()
        return code, "".join(self.lines)


def test_a_signal_lets_running_requests_finish():
    with Process(40) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/health").json()["status"] == "ok"
        with client.stream("POST", "/v1/chat/completions", json=ASKED) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        code, said = server.end()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
    assert rest[-1] == "data: [DONE]" and '"finish_reason": "stop"' in rest[-2]
    assert code == 143 and "finishing the running requests" in said and "terminated" in said
    assert "serving glm2-demo: 16 slots of 1024 tokens" in said and "no API key" in said
    assert "POST /v1/chat/completions 200" in said and "Traceback" not in said


def test_a_second_signal_stops_at_once():
    flags = "--log-level", "error"
    with Process(10_000, *flags) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", "/v1/chat/completions", json=ASKED) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            seen = [next(lines) for _ in range(20)]  # it goes on
            server.process.send_signal(signal.SIGTERM)
            code, said = server.end()
            rest = [line for line in lines if line]
    assert any("content" in line for line in seen[2:])
    assert "stopping" in rest[-2] and rest[-1] == "data: [DONE]"  # the client is told
    assert code == 130 and "interrupted" in said and "Traceback" not in said


def test_what_cannot_work_is_refused_before_a_model_is_loaded(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("GLM2_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, words in (
            (["--port", port], ["cannot listen", str(port), "another --port"]),
            (["--port", 70_000], ["0 to 65535"]),
            (["--host", "0.0.0.0"], ["needs an API key", "--api-key-file"]),
            (["--api-key-file", tmp_path / "absent"], ["cannot be read"]),
            (["--host", "no.such.host.invalid", "--insecure"], ["cannot listen"]),
            (["--cors-origin", "https://a.example/"], ["--cors-origin https://a.example\n"]),
            (["--served-model-name", ""], ["'' cannot be the name"]),
            (["--served-model-name", "x" * 257], ["1 to 256 printable"]),
            (["--lora", f"glm2-demo={tmp_path}"], ["'glm2-demo' is the name of the model itself"]),
        ):
            assert exit_code(command.main, *flags) == 2
            said = capsys.readouterr().err
            assert all(word in said for word in words) and "loading" not in said


def test_a_context_that_no_chat_fits_into_is_refused(capsys):
    assert exit_code(command.main, "--port", 0, "--max-length", 5) == 2
    assert "--max-length must be at least" in capsys.readouterr().err


def test_invalid_http_is_answered_with_an_error_object():
    transport, written = Mock(), []
    transport.write, transport.get_extra_info.return_value = written.append, None
    config = uvicorn.Config(Mock(), http=HttpProtocol, log_config=None, lifespan="off")
    protocol = HttpProtocol(config, ServerState(), {}, Mock())
    protocol.connection_made(transport)
    protocol.data_received(b"\x00\x01 no HTTP\r\n\r\n")
    head, _, body = written[0].decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 400 ") and f"content-length: {len(body)}" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"
    transport.close.assert_called_once()


def test_answers_that_the_server_cuts_off_are_no_errors_of_uvicorn():
    def record(message, error=None):
        info = error and (type(error), error, None)
        return logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, message, (), info)

    assert not is_news(record("ASGI callable returned without completing response."))
    assert not is_news(record("Exception in ASGI application\n", asyncio.CancelledError()))
    assert is_news(record("Exception in ASGI application\n", ValueError()))
    assert is_news(record("Invalid HTTP request received."))


def test_the_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "fastapi" else name)
    assert exit_code(command.main) == 2
    said = capsys.readouterr().err
    assert "not installed: fastapi" in said and "pip install fastapi llguidance" in said
