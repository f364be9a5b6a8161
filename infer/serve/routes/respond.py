"""Answers the prompts of a request, complete or as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from fastapi import Request
from pydantic_core import to_json
from starlette.responses import Response

from infer.serve import answers
from infer.serve.answers import Json, Shape
from infer.serve.jobs import Jobs, unless_left
from infer.serve.prompts import Prompt, Sampled, elsewhere
from infer.serve.routes.route import client_of
from infer.serve.schema import Common
from infer.serve.service import Service
from infer.serve.stream import Stream

# For the description of routes: the schema of each event.
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM = {"text/event-stream": {"schema": _EVENT}}


async def respond(
    service: Service,
    request: Request,
    body: Common,
    prompts: Sequence[Prompt],
    asked: Sampled,
    shape: Shape,
    head: Json,
    headers: dict[str, str],
) -> Response:
    """Return the response; `head` is what the answer, or all its chunks, have.

    ApiError, GLMError: a prompt cannot be answered.
    """
    with ExitStack() as stack:
        jobs = stack.enter_context(Jobs(service, client_of(request)))
        await jobs.submit(prompts, asked, service.models[head["model"]])
        if body.stream:
            options = body.stream_options
            stream = Stream(
                jobs,
                shape,
                head,
                count=asked.count,
                include_usage=bool(options and options.include_usage),
                headers=headers,
            )
            stack.pop_all()  # it ends them
            return stream
        done = await unless_left(request, jobs.completions())

    def content() -> bytes:
        used = answers.usage(jobs.jobs, done if shape.answer else (), asked.count)
        # One choice at a time: no other thread runs while `to_json` does.
        choices = (to_json(shape.complete(i, one, jobs.jobs[i])) for i, one in enumerate(done))
        rest = to_json({**head, "usage": used}).removesuffix(b"}")
        return rest + b',"choices":[' + b",".join(choices) + b"]}"

    return Response(await elsewhere(content, True), media_type="application/json", headers=headers)
