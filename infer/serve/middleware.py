"""ASGI middleware: request ids and the log; limits on bodies."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm2_jax.escape import escape_controls
from infer.serve.errors import ApiError

BODY_SECONDS = 60.0  # for a complete body to arrive
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_log = logging.getLogger("infer.serve")


class RequestId:
    """Gives every answer the X-Request-Id of its request, or a new one, and logs the request.

    Neither the query nor the body is logged: they may have keys and prompts.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            path, seconds = escape_controls(scope["path"])[:200], time.monotonic() - began
            _log.info("%s %s %d %.3f s %s", scope["method"], path, status, seconds, name)


class BodyLimit:
    """Refuses bodies that are too large, also where their length is not declared, or too slow."""

    def __init__(self, app: ASGIApp, most: int, seconds: float = BODY_SECONDS):
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        size = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
        until, complete = asyncio.get_running_loop().time() + self._seconds, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:  # what comes now is the client's leaving
                return await receive()
            self._check(size if declared else 0)
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "The body took too long to arrive.") from None
            if message["type"] == "http.request":
                size = (0 if declared else size) + len(message.get("body", b""))
                self._check(size)
                complete = not message.get("more_body", False)
            return message

        await self._app(scope, limited, send)

    def _check(self, size: int) -> None:
        if size > self._most:
            raise ApiError(
                413,
                f"The body is too large: at most {self._most} bytes are accepted.",
                code="body_too_large",
            )
