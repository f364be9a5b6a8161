"""How routes read JSON bodies, and what they share."""

from __future__ import annotations

import email.message
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.responses import Response

from infer.serve.errors import ApiError
from infer.serve.replies import ERRORS


class _JsonRequest(Request):
    """A request whose body is strict JSON: finite numbers, whole characters, bounded nesting."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(
                400, f"The body is not valid JSON: {error}", code="invalid_json"
            ) from None


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


def client_of(request: Request) -> str:
    """Return whose request it is."""
    return request.scope.get("state", {}).get("client", "")
