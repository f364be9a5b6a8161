"""How routes read JSON bodies, and what they share."""

from __future__ import annotations

import email.message
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic_core import from_json, to_json
from starlette.responses import Response

from infer.serve.errors import ApiError
from infer.serve.prompts import elsewhere
from infer.serve.replies import ERRORS

MAX_FIELDS = 1000  # of a body


class _JsonRequest(Request):
    """A request whose body is strict JSON: finite numbers, whole characters, bounded nesting."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            value = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(
                400, f"The body is not valid JSON: {error}", code="invalid_json"
            ) from None
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ApiError(
                400,
                f"The body has {len(value)} fields; at most {MAX_FIELDS} are read.",
                code="invalid_value",
            )
        return value


class _JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            if self.body_field is not None:
                _check_type(request)
            return await handler(_JsonRequest(request.scope, request.receive))

        return checked


def _check_type(request: Request) -> None:
    """Raise ApiError for another type than JSON, which pages elsewhere could send unasked."""
    message = email.message.Message()
    message["content-type"] = request.headers.get("content-type", "")
    subtype = message.get_content_subtype()
    if message.get_content_maintype() != "application" or not f"+{subtype}".endswith("+json"):
        raise ApiError(415, "Send the body with the header 'Content-Type: application/json'.")


def router() -> APIRouter:
    """Return a router whose routes read JSON and document the errors."""
    return APIRouter(route_class=_JsonRoute, responses=ERRORS)


async def json_response(
    make: Callable[[], Any], headers: dict[str, str], *, long: bool
) -> Response:
    """Return a response with what `make` returns, made in another thread where it is `long`."""
    content = await elsewhere(lambda: to_json(make()), long)
    return Response(content, media_type="application/json", headers=headers)


def client_of(request: Request) -> str:
    """Return whose request it is."""
    return request.scope.get("state", {}).get("client", "")
