"""A client of `/v1/completions` that costs little: it shares the cores with the server.

The standard library's streams, one connection for each request, and no object for what is not
measured: about 30 us of a core for each token.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_LINE = 2**20  # bytes of the longest line of an answer


@dataclass(frozen=True)
class Target:
    """A server that is measured."""

    name: str
    url: str  # without a path
    model: str = ""
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True)
class Request:
    """What a user sends; `arrival` is in seconds after the start, None = as soon as possible."""

    prompt: Sequence[int]
    new_tokens: int
    seed: int
    temperature: float = 0.0
    arrival: float | None = None


@dataclass
class Outcome:
    """What a user saw; seconds of one clock. Without an `error` there is at least one token."""

    start: float  # when it was sent, or should have been sent
    times: list[float] = field(default_factory=list)  # when each part of the answer came
    end: float = 0.0
    tokens: int = 0  # of a complete answer, as the server counts them
    error: str = ""  # its kind


class _Failed(Exception):
    """A request that has no complete answer; the text is its kind."""


async def ask(target: Target, request: Request, *, start: float, timeout: float) -> Outcome:
    """Send a request that is due at `start` of `time.perf_counter()`, and read the answer."""
    outcome = Outcome(start)
    try:
        async with asyncio.timeout(timeout):
            await _stream(target, request, outcome)
        if not outcome.tokens:
            outcome.error = "empty answer"
        elif not outcome.times:  # tokens without a text
            outcome.times.append(time.perf_counter())
    except _Failed as error:
        outcome.error = str(error)
    except TimeoutError:
        outcome.error = "timed out"
    except EOFError:
        outcome.error = "answer ended early"
    except OSError as error:
        outcome.error = f"connection: {error.strerror or type(error).__name__}"
    except (ValueError, LookupError, TypeError):
        outcome.error = "malformed answer"
    outcome.end = time.perf_counter()
    return outcome


async def _stream(target: Target, request: Request, outcome: Outcome) -> None:
    """Fill an outcome; every exception that `ask` knows may come out."""
    body = {
        "model": target.model,
        "prompt": request.prompt,
        "max_tokens": request.new_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with Exchange(target, "POST", "/v1/completions", json.dumps(body).encode()) as (
        status,
        lines,
    ):
        if status != 200:
            raise _Failed(f"HTTP {status}")
        async for line in lines:
            if not line.startswith(b"data:"):
                continue
            event = line[5:].strip()
            if event == b"[DONE]":
                outcome.tokens = outcome.tokens or len(outcome.times)
                return
            _read(json.loads(event), outcome)
    raise EOFError


def _read(event: Mapping[str, Any], outcome: Outcome) -> None:
    """Take an event; one that only ends an answer, or tells its usage, is no token."""
    if "error" in event:
        raise _Failed("error in the stream")
    for choice in event["choices"]:
        if choice["text"] or choice.get("finish_reason") is None:
            outcome.times.append(time.perf_counter())
    if usage := event.get("usage"):
        outcome.tokens = usage["completion_tokens"]


async def get(target: Target, path: str) -> tuple[int, bytes]:
    """Return the status and the body of a GET; OSError or EOFError: the server is not there."""
    async with Exchange(target, "GET", path) as (status, lines):
        return status, b"\n".join([line async for line in lines])


class Exchange:
    """A connection for one request with a body, which may be empty: a context with the status and
    the lines of the answer."""

    def __init__(self, target: Target, method: str, path: str, data: bytes = b""):
        self._split = urlsplit(target.url)
        head = [
            f"{method} {self._split.path}{path} HTTP/1.1",
            f"Host: {self._split.netloc}",
            "Connection: close",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
        ]
        if target.api_key:
            head.append(f"Authorization: Bearer {target.api_key}")
        self._bytes = "\r\n".join([*head, "", ""]).encode() + data

    async def __aenter__(self) -> tuple[int, AsyncIterator[bytes]]:
        tls = self._split.scheme == "https"
        port = self._split.port or (443 if tls else 80)
        reader, self._writer = await asyncio.open_connection(
            self._split.hostname, port, ssl=tls or None, limit=_LINE
        )
        try:
            self._writer.write(self._bytes)
            await self._writer.drain()
            status = await reader.readline()
            chunked = False
            while line := (await reader.readline()).strip().lower():
                name, _, value = line.partition(b":")
                chunked |= name == b"transfer-encoding" and b"chunked" in value
            if not status:
                raise EOFError
            return int(status.split()[1]), _lines(_parts(reader, chunked))
        except BaseException:
            self._writer.close()
            raise

    async def __aexit__(self, *exception: object) -> None:
        self._writer.close()


async def _parts(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """Yield the body, as it comes; EOFError if the last chunk is missing."""
    if not chunked:
        while data := await reader.read(_LINE):
            yield data
        return
    while line := await reader.readline():
        size = int(line.partition(b";")[0], 16)
        if not size:
            return
        yield (await reader.readexactly(size + 2))[:-2]
    raise EOFError


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest
