"""How the server is: /health and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from infer.engine.params import SamplingParams
from infer.serve.jobs import Jobs
from infer.serve.metrics import Metrics
from infer.serve.prompts import Prompt, Sampled
from infer.serve.replies import Health
from infer.serve.routes.route import router
from infer.serve.service import Service

STALLED = 60.0  # seconds without a step while requests wait


def make(service: Service) -> APIRouter:
    """Return the routes."""
    routes = router()

    async def health(request: Request, deep: bool = False) -> Response:
        """Return 200 if requests can be answered; with `deep`, after answering one token."""
        state = _state(service)
        if deep and state["status"] == "ok":
            await answer_tokens(service, 1)
            state = _state(service)
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    responses: dict[int | str, dict[str, Any]] = {200: {"model": Health}, 503: {"model": Health}}
    text: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
    }
    for method, shown in (("GET", True), ("HEAD", False)):
        options: dict[str, Any] = {"methods": [method], "include_in_schema": shown}
        routes.add_api_route("/health", health, responses=responses, **options)
        routes.add_api_route(
            "/metrics", metrics, responses=text, response_class=Response, **options
        )
    return routes


def _state(service: Service) -> dict[str, Any]:
    now = service.worker.status
    status = "stopped" if not now.alive else "stalled" if now.age > STALLED else "ok"
    shown = {"age": round(now.age, 3), "slots": now.slots}
    return {"status": status, **shown, "running": now.running, "waiting": now.waiting}


async def answer_tokens(service: Service, count: int) -> None:
    """Have the model write `count` tokens; ApiError if it does not."""
    sampling = SamplingParams(temperature=0.0, max_new_tokens=count, ignore_eos=True)
    uncounted = Metrics("health", service.worker)  # it is no client's request
    with Jobs(service, "health", uncounted) as jobs:
        prompt = Prompt(service.facts.tokenizer.start_ids)
        await jobs.submit([prompt], Sampled(sampling, 1, clean=False))
        await jobs.completions()
