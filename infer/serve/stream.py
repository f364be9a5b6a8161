"""Streams of server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from glm2_jax.escape import json_line
from infer.engine.answer import Completion
from infer.serve import answers
from infer.serve.answers import Json, Shape
from infer.serve.errors import ApiError
from infer.serve.jobs import Jobs
from infer.serve.prompts import elsewhere

STALLED = 30.0  # seconds after which a reader that takes nothing is dropped
_log = logging.getLogger("infer.serve")


class Stream(EventSourceResponse):
    """The answers to submitted jobs, which are cancelled when it ends, however it ends."""

    def __init__(
        self,
        jobs: Jobs,
        shape: Shape,
        head: Json,
        *,
        count: int,
        include_usage: bool,
        headers: dict[str, str],
    ):
        """`head` is what all chunks have; there are `count` answers to each prompt."""
        chunks = _chunks(jobs, shape, head, count, include_usage)
        super().__init__(
            _events(chunks, shape.long), headers=headers, sep="\n", send_timeout=STALLED
        )
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the generator's `finally`: one that was never started has none to run.
        with self._jobs:
            try:
                await super().__call__(scope, receive, send)
            except SendTimeoutError:
                _log.warning("a reader took nothing for %g s and was dropped", STALLED)


async def _chunks(
    jobs: Jobs, shape: Shape, head: Json, count: int, include_usage: bool
) -> AsyncIterator[Json]:
    more = {"usage": None} if include_usage else {}
    done: list[Completion] = []
    for index in range(len(jobs.jobs)):
        for choice in shape.begin(index):
            yield {**head, "choices": [choice], **more}
    async for index, event in jobs.events():
        if event.completion is not None:
            done.append(event.completion)
        step = partial(shape.step, index, event, jobs.jobs[index])
        for choice in await elsewhere(step, shape.long):
            yield {**head, "choices": [choice], **more}
    if include_usage:
        yield {
            **head,
            "choices": [],
            "usage": answers.usage(jobs.jobs, done if shape.answer else (), count),
        }


async def _events(chunks: AsyncIterator[Json], long: bool) -> AsyncIterator[ServerSentEvent]:
    try:
        async for chunk in chunks:
            yield await elsewhere(partial(_event, chunk), long)
    except ApiError as error:
        yield _event(error.body)
    except Exception:  # the status line is sent already: say it here
        _log.exception("an answer ended with an unexpected error")
        yield _event(ApiError(500, "Internal server error.", code="internal_error").body)
    yield ServerSentEvent("[DONE]", sep="\n")


def _event(value: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json_line(value, allow_nan=False), sep="\n")
