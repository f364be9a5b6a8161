"""Errors in the shape of OpenAI's: every path that fails answers with one of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from glm2_jax.errors import GLMError, InputError, UsageError
from glm2_jax.escape import escape_controls
from infer.batching.job import Busy, Failure

_log = logging.getLogger("infer.serve")
# Of failures; of others 500.
_STATUS = {"grammar": 400, "deadline": 504, "stopping": 503, "cancelled": 503}
_HINTS = {
    404: "No such route. The routes are described in /openapi.json.",
    405: "This route does not support the method.",
}


class ApiError(HTTPException):
    """An error that a client is told: status, message, and what `code` and `param` say of it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers) if headers else None)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body: dict[str, Any] = {"error": error}

    @property
    def response(self) -> Response:
        return JSONResponse(self.body, self.status_code, self.headers)


def unsupported(param: str, why: str) -> ApiError:
    """Return the error of a field that would change the text and is not supported."""
    return ApiError(
        400, f"`{param}` is not supported: {why}", code="unsupported_parameter", param=param
    )


def too_long(prompt: int, answer: int | None, limit: int, param: str) -> ApiError:
    """Return the error of a prompt that does not fit, with the numbers."""
    asked = f"your prompt has at least {prompt} tokens, which leaves no room for an answer"
    if answer is not None:
        asked = (
            f"you requested {prompt + answer} tokens"
            f" ({prompt} in the prompt, {answer} for the completion)"
        )
    message = (
        f"This model's maximum context length is {limit} tokens, but {asked}. "
        "Shorten the prompt or ask for a shorter completion; nothing is cut off silently."
    )
    return ApiError(400, message, code="context_length_exceeded", param=param)


def of_expected(error: GLMError, param: str | None = None) -> ApiError:
    """Return what a client is told of an expected error of the engine, or of a parameter."""
    if isinstance(error, Busy):
        wait = {"Retry-After": str(max(1, round(error.retry_after)))}
        return ApiError(429, _sentences(error), code="server_busy", headers=wait)
    if isinstance(error, InputError | UsageError):
        return ApiError(400, _sentences(error), code="invalid_value", param=param)
    return ApiError(500, _sentences(error), code="internal_error")


def of_failure(failure: Failure) -> ApiError:
    """Return what a client is told of a job that has no complete answer."""
    status = _STATUS.get(failure.reason, 500)
    headers = {"Retry-After": "5"} if status == 503 else None
    return ApiError(status, _sentences(failure.error), code=failure.reason, headers=headers)


def _sentences(error: GLMError) -> str:
    parts = [part for part in (error.what, *error.why.splitlines(), error.fix) if part]
    return " ".join(part if part.endswith((".", "!", "?")) else f"{part}." for part in parts)


def _allowed(request: Request) -> list[str]:
    """Return the methods of a path, which several routes may share; none for a static file."""
    known = []
    for method in ("GET", "HEAD", "POST"):
        scope = {**request.scope, "method": method}
        matches = (route.matches(scope)[0] for route in request.app.router.routes)
        known += [method] if Match.FULL in matches else []
    return known


def install(app: FastAPI) -> None:
    """Have every error of the app answered in this shape."""

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        if not isinstance(error, ApiError):
            text = _HINTS.get(error.status_code, str(error.detail))
            headers = error.headers
            if error.status_code == 405 and (methods := _allowed(request)):
                headers = {"Allow": ", ".join(methods)}
            error = ApiError(error.status_code, text, headers=headers)
        return error.response

    async def of_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first, *others = error.errors()
        place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        where = escape_controls(".".join(place))[:200]
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        message += f" ({len(others)} more)" if others else ""
        return ApiError(422, escape_controls(message)[:500], param=where or None).response

    async def of_expected_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, GLMError)
        return of_expected(error).response

    async def of_bug(request: Request, error: Exception) -> Response:
        return ApiError(500, "Internal server error.", code="internal_error").response

    app.add_exception_handler(StarletteHTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(GLMError, of_expected_error)
    app.add_exception_handler(Exception, of_bug)  # Starlette logs it, with its traceback
