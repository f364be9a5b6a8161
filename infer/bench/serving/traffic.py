"""What users send and when: the same for every server, as a seed decides it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from infer.bench.serving import client
from infer.bench.serving.client import Outcome, Request, Target
from infer.bench.serving.options import LoadSettings

IDS = (300, 1300)  # prompts are of these ids, ordinary pieces of every model of the family
_LONGEST = 4  # times the median


@dataclass(frozen=True)
class Level:
    """One measurement: a number of users, or a rate of requests per second."""

    users: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return f"{self.users} user{'' if self.users == 1 else 's'}"


def levels(load: LoadSettings) -> list[Level]:
    """Return what is measured, in order."""
    if load.rate:
        return [Level(rate=rate) for rate in load.rate]
    return [Level(users=users) for users in load.users]


def plan(load: LoadSettings, level: Level) -> list[Request]:
    """Return the requests of a measurement, those with a rate in the order of their arrival."""
    random = np.random.default_rng([load.seed, level.users or 0, int(1e6 * (level.rate or 0))])
    if level.rate is None:
        assert level.users is not None
        number = load.requests or 8 * level.users
        arrivals: Sequence[float | None] = [None] * number
    else:
        number = load.requests or max(round(60 * level.rate), 1)
        arrivals = np.cumsum(random.exponential(1 / level.rate, number)).tolist()

    def lengths_around(median: int) -> list[int]:
        drawn = median * np.exp(load.spread * random.standard_normal(number))
        return np.clip(np.rint(drawn), 1, _LONGEST * median).astype(int).tolist()

    sizes = zip(
        lengths_around(load.prompt_tokens), lengths_around(load.new_tokens), arrivals, strict=True
    )
    return [
        Request(random.integers(*IDS, length).tolist(), new, i, load.temperature, arrival)
        for i, (length, new, arrival) in enumerate(sizes)
    ]


async def send(
    target: Target,
    level: Level,
    requests: Sequence[Request],
    *,
    timeout: float,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Send the requests as the level says it; returns what became of each, in order of the end."""
    outcomes: list[Outcome] = []
    begin = time.perf_counter()

    async def one(request: Request, start: float) -> None:
        outcome = await client.ask(target, request, start=start, timeout=timeout)
        outcomes.append(outcome)
        done(outcome)

    async def user() -> None:
        for request in waiting:  # one list for all of them
            await one(request, time.perf_counter())

    waiting = iter(requests)
    async with asyncio.TaskGroup() as group:
        if level.rate is None:
            for _ in range(level.users or 1):
                group.create_task(user())
        else:
            for request in waiting:
                # From when it is due: a generator that is late must not hide that users waited.
                start = begin + (request.arrival or 0.0)
                await asyncio.sleep(start - time.perf_counter())
                group.create_task(one(request, start))
    return outcomes
