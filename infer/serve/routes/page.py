"""GET /: the chat page, and its static files."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from infer.serve.errors import ApiError
from infer.serve.security import PAGE_HEADERS

STATIC = Path(__file__).parents[1] / "static"


class _PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS | {"Cache-Control": "no-cache"})
        return response


def add(app: FastAPI) -> None:
    """Add the page to an app."""

    async def page(request: Request) -> Response:
        index = STATIC / "index.html"
        if not index.is_file():
            raise ApiError(404, "This installation has no chat page; the API is at /v1.")
        return FileResponse(index, headers=PAGE_HEADERS | {"Cache-Control": "no-cache"})

    app.add_route("/", page, methods=["GET"], include_in_schema=False)
    if STATIC.is_dir():
        app.mount("/static", _PageFiles(directory=STATIC))
