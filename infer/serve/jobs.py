"""The jobs of one request: submits them, passes their events on, cancels them in the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

from fastapi import Request

from infer.batching.job import Event, Failure, Job
from infer.engine.answer import Completion
from infer.engine.rows import TokenEvent
from infer.serve.errors import ApiError, of_failure
from infer.serve.metrics import Metrics
from infer.serve.prompts import LONG, Prompt, Sampled, elsewhere
from infer.serve.service import Service

T = TypeVar("T")


class Jobs:
    """The jobs of one request, which a `with` block ends: whatever happened in it.

    Attributes:
        jobs: in the order of the choices: all answers to the first prompt, to the second, ...
    """

    def __init__(self, service: Service, client: str, metrics: Metrics | None = None):
        """They are recorded in `metrics`; None = those of the service."""
        self._service, self._client = service, client
        self._metrics = metrics or service.metrics
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.jobs: list[Job] = []

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End those that have not ended, within a step."""
        for job in self.jobs:
            self._service.worker.cancel(job)

    async def submit(self, prompts: Sequence[Prompt], asked: Sampled, adapter: int = 0) -> None:
        """Make `asked.count` jobs of each prompt and put all into the queue.

        Busy: there is no room for all of them; none is answered.
        """
        slots, queue = self._service.worker.options.slots, self._service.options.queue
        if len(prompts) * asked.count > slots + queue:
            raise ApiError(
                400,
                f"The request has {len(prompts)} prompts with {asked.count} answers each; at most "
                f"{slots + queue} answers are possible: {slots} slots and a queue of {queue}.",
                code="invalid_value",
            )
        self._began = time.monotonic()
        # A job takes about as long to make as 100 tokens of its prompt take to be checked.
        long = asked.count * sum(100 + len(prompt.ids) for prompt in prompts) > LONG
        self.jobs = await elsewhere(lambda: self._make(prompts, asked, adapter), long)
        self._service.worker.submit(*self.jobs)

    def _make(self, prompts: Sequence[Prompt], asked: Sampled, adapter: int) -> list[Job]:
        limit = self._service.options.request_timeout
        jobs: list[Job] = []
        for prompt in prompts:
            for draw in range(asked.count):
                job = self._service.worker.job(
                    prompt.ids,
                    asked.sampling,
                    self._listener(len(jobs)),
                    draw=draw,
                    clean=asked.clean,
                    client=self._client,
                    deadline=self._began + limit if limit else None,
                    adapter=adapter,
                    score_prompt=asked.score_prompt,
                    grammar=asked.grammars[draw] if asked.grammars else None,
                )
                jobs.append(job)
        return jobs

    def _listener(self, index: int):
        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return listen

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Yield (index of the job, event) until all have ended; ApiError if one fails."""
        metrics, left = self._metrics, len(self.jobs)
        last: dict[int, float] = {}
        while left:
            index, event = await self._events.get()
            if isinstance(event, Failure):
                raise of_failure(event)
            now = time.monotonic()
            if index in last:
                metrics.next_token(now - last[index])
            else:
                metrics.first_token(self.jobs[index], now - self._began)
            last[index] = now
            if event.completion is not None:
                metrics.ended(event.completion, now - self._began)
                left -= 1
            yield index, event

    async def completions(self) -> list[Completion]:
        """Wait for all answers; ApiError if one fails."""
        found = {i: event.completion async for i, event in self.events() if event.completion}
        return [found[index] for index in range(len(self.jobs))]


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`; ApiError, and `work` is cancelled, if the client has left."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ApiError(499, "The client has left.", code="cancelled")  # not read by any client
        return answer.result()
    finally:
        answer.cancel()
        leaving.cancel()
