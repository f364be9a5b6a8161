"""The ASGI application: routes, errors, and what stands before them."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from glm2_jax.cli.main import version
from infer.serve import errors
from infer.serve.middleware import BodyLimit, RequestId
from infer.serve.routes import chat, completions, models, official, page, state, tokens
from infer.serve.security import Access, KeyCheck
from infer.serve.service import Service


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
        guarded = CORSMiddleware(
            guarded,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Warning", "Retry-After"],
        )
    return RequestId(guarded)
