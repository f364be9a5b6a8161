"""What bad clients do to a server; each returns a line of what it did wrong, or ""."""

import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from infer.bench.serving.client import Exchange, Target

LIMIT = 60  # seconds within which every bad request must be answered
Attack = Callable[[Target, dict[str, Any]], Awaitable[str]]


@contextlib.asynccontextmanager
async def connection(target: Target):
    split = urlsplit(target.url)
    reader, writer = await asyncio.open_connection(split.hostname, split.port)
    try:
        yield reader, writer
    finally:
        writer.close()


def head(length: int, path: str = "/v1/completions", method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


async def vanish(target: Target, body: dict[str, Any]) -> str:
    """Leave in the middle of a long stream, and of a long answer without one."""
    for stream in (True, False):
        data = json.dumps(body | {"max_tokens": 150, "stream": stream, "n": 3}).encode()
        async with connection(target) as (reader, writer):
            writer.write(head(len(data)) + data)
            await writer.drain()
            if stream:
                begin = await asyncio.wait_for(reader.readuntil(b"data: "), LIMIT)
                if b" 200 " not in begin:
                    return f"{begin!r}"
            else:
                await asyncio.sleep(0.1)
            writer.transport.abort()
    return ""


async def stall(target: Target, body: dict[str, Any]) -> str:
    """Ask for much and read nothing; send half a body and nothing more."""
    data = json.dumps(body | {"max_tokens": 100, "stream": True, "n": 8}).encode()
    async with connection(target) as (_, writer), connection(target) as (_, other):
        writer.write(head(len(data)) + data)
        other.write(head(len(data)) + data[: len(data) // 2])
        await asyncio.sleep(3)
    return ""


async def garbage(target: Target, body: dict[str, Any]) -> str:
    """Send what is no HTTP, and what is no JSON: no answer may be a 5xx, or none at all."""
    async with connection(target) as (reader, writer):
        writer.write(os.urandom(4000) + b"\r\n\r\n")
        with contextlib.suppress(OSError):
            answer = await asyncio.wait_for(reader.read(), LIMIT)
            if answer and b" 400 " not in answer[:40]:
                return f"random bytes: {answer[:60]!r}"
    bodies = (
        b"\xff\xfe{",
        b"[" * 100_000,
        b"{}",
        b"null",
        b'{"prompt": "\\ud800"}',
        os.urandom(99),
    )
    return await refused(target, bodies)


async def large(target: Target, body: dict[str, Any]) -> str:
    """Send 10 MB, declared and not, and a million stop strings."""
    stops = json.dumps(body | {"stop": ["x"] * 1_000_000}).encode()
    ids = json.dumps(body | {"prompt": [500] * 1_500_000}).encode()
    text = json.dumps(body | {"prompt": "字" * 100_000}).encode()
    return await refused(target, (b" " * 10_000_000, stops, ids, text))


async def numbers(target: Target, body: dict[str, Any]) -> str:
    """Send numbers that are none, too large, or of the wrong type."""
    names = ("temperature", "top_p", "top_k", "max_tokens", "seed", "presence_penalty", "n",
             "repetition_penalty", "frequency_penalty", "stop", "logit_bias", "prompt")  # fmt: skip
    bad = ("NaN", "Infinity", "-Infinity", "1e999", "-1e30", '"1"', "true", "[[]]", "9" * 400)
    bodies = []
    for name in names:
        for value in bad:
            if (name, value) in {("stop", '"1"'), ("prompt", '"1"')}:
                continue  # which are right
            rest = json.dumps({key: item for key, item in body.items() if key != name})
            bodies.append(f'{rest[:-1]}, "{name}": {value}}}'.encode())
    return await refused(target, bodies)


async def refused(target: Target, bodies) -> str:
    """Send bodies of which each must be refused with a 4xx and an error object."""
    for data in bodies:
        exchange = Exchange(target, "POST", "/v1/completions", data)
        shown = f"{data[:20]!r}...{data[-60:]!r}"
        try:
            async with asyncio.timeout(LIMIT), exchange as (status, lines):
                answer = b"".join([line async for line in lines])
        except TimeoutError:
            return f"{shown}: no answer"
        except OSError:  # it closed the connection while the body was being sent
            continue
        if not 400 <= status < 500 or "message" not in json.loads(answer)["error"]:
            return f"{shown}: {status} {answer[:200]!r}"
    return ""


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack for attack in (vanish, stall, garbage, large, numbers)
}
