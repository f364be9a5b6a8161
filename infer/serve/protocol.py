"""What uvicorn says itself: the answer to invalid HTTP, and its log."""

from __future__ import annotations

import asyncio
import logging
import uuid

from uvicorn.protocols.http.h11_impl import H11Protocol

from infer.serve.errors import ApiError


class HttpProtocol(H11Protocol):
    """Answers invalid HTTP with an error object, like everything else."""

    def send_400_response(self, msg: str) -> None:
        """Answer with status 400, unless an answer has begun, and close the connection."""
        cycle = self.cycle
        if cycle is None or not cycle.response_started or cycle.response_complete:
            response = ApiError(400, msg, code="invalid_http").response
            fields = {**response.headers, "connection": "close", "x-request-id": uuid.uuid4().hex}
            lines = [f"{name}: {value}\r\n" for name, value in fields.items()]
            head = f"HTTP/1.1 400 Bad Request\r\n{''.join(lines)}\r\n"
            self.transport.write(head.encode() + bytes(response.body))
        self.transport.close()


def is_news(record: logging.LogRecord) -> bool:
    """Return whether uvicorn reports more than an answer that this server has cut off itself."""
    if record.msg == "ASGI callable returned without completing response.":
        return False
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
