"""The ASGI application: routes, errors, and what stands before them."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from glm2_jax.cli.main import version
from infer.serve import errors
from infer.serve.middleware import BodyLimit, RequestId
from infer.serve.routes import chat, completions, models, official, page, state, tokens
from infer.serve.security import Access, KeyCheck
from infer.serve.service import Service


class _OtherPages(CORSMiddleware):
    """Lets web pages of other origins use the API; a refusal is an error object."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        why = bytes(response.body).decode()
        message = f"{why}. Origins are allowed with --cors-origin, methods are GET and POST."
        kept = {name: value for name, value in response.headers.items() if name != "content-type"}
        del kept["content-length"]
        return errors.ApiError(400, message, code="forbidden_origin", headers=kept).response


def build(service: Service, access: Access, origins: Sequence[str] = ()) -> ASGIApp:
    """Return the application; web pages of `origins` may use it, besides its own page."""
    app = FastAPI(
        title="glm2-jax",
        version=version().split()[-1].strip("()"),
        description="The API of OpenAI, answered by a model of the ChatGLM family.",
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    errors.install(app)
    for routes in (chat, completions, models, tokens, state, official):
        app.include_router(routes.make(service))
    page.add(app)
    guarded: ASGIApp = KeyCheck(BodyLimit(app, service.options.max_body_bytes), access)
    if origins:
        guarded = _OtherPages(
            guarded,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Warning", "Retry-After"],
        )
    return RequestId(guarded)
