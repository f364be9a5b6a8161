"""/v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from infer.serve.replies import Model, Models
from infer.serve.routes.route import router
from infer.serve.service import Service


def make(service: Service) -> APIRouter:
    """Return the routes."""
    routes, facts = router(), service.facts

    def described(name: str) -> dict[str, Any]:
        base = next(iter(service.models))
        return {
            "id": name,
            "object": "model",
            "created": facts.created,
            "owned_by": "glm2-jax",
            "root": base,
            "parent": base if service.models[name] else None,  # of a LoRA adapter
            "max_model_len": facts.max_length,
        }

    @routes.get("/v1/models", responses={200: {"model": Models}})
    async def models() -> Response:
        """List the models that are served."""
        return JSONResponse({"object": "list", "data": list(map(described, service.models))})

    @routes.get("/v1/models/{name:path}", responses={200: {"model": Model}})
    async def model(name: str) -> Response:
        """Describe a model."""
        return JSONResponse(described(service.model(name)))

    return routes
