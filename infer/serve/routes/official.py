"""POST /: the API of the official api.py."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from infer.serve import fields
from infer.serve.jobs import Jobs, unless_left
from infer.serve.prompts import check_lengths, official_prompt, official_sampled
from infer.serve.replies import OfficialAnswer
from infer.serve.routes.route import client_of, router
from infer.serve.schema import OfficialBody
from infer.serve.service import Service


def make(service: Service) -> APIRouter:
    """Return the route."""
    routes = router()

    @routes.post("/", responses={200: {"model": OfficialAnswer}})
    async def official(body: OfficialBody, request: Request) -> Response:
        """Answer a question, as the official api.py does."""
        headers = fields.check(body.model_extra, strict=service.options.strict)
        prompt = await official_prompt(service.facts, body)
        check_lengths(service.facts, [prompt], None, "prompt")
        with Jobs(service, client_of(request)) as jobs:
            await jobs.submit([prompt], official_sampled(service.facts, body))
            (done,) = await unless_left(request, jobs.completions())
        answer = {
            "response": done.text,
            "history": [*(body.history or []), [body.prompt, done.text]],
            "status": 200,
            "time": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        }
        return JSONResponse(answer, headers=headers)

    return routes
