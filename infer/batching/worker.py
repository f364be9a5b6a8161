"""The one thread that owns the device: runs what the scheduler plans and tells the listeners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infer.batching.job import Event, Job
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams


@dataclass(frozen=True)
class Status:
    """What a worker is doing now.

    `age` is the seconds since the device last finished a step, or since work began to wait for it;
    0 while there is nothing to do. `alive` is whether the thread runs.
    """

    slots: int
    running: int
    waiting: int
    age: float
    alive: bool


class Worker:
    """Answers jobs in the slots of one batch."""

    def __init__(
        self,
        engine: Engine,
        *,
        slots: int,
        tokens_per_prefill: int = 256,
        queue: int = 1024,
        deterministic: bool = False,
    ):
        raise NotImplementedError

    def warm(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile every program ahead."""
        raise NotImplementedError

    def job(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        listener: Callable[[Event], None],
        *,
        draw: int = 0,
        clean: bool = False,
        client: str = "",
        deadline: float | None = None,
        adapter: int = 0,
        score_prompt: int | None = None,
    ) -> Job:
        """Make a job; any thread. InputError or UsageError: as `Engine.run`."""
        raise NotImplementedError

    def submit(self, job: Job) -> None:
        """Put a job into the queue; any thread. Busy: the queue is full, or the worker stops."""
        raise NotImplementedError

    def cancel(self, job: Job) -> None:
        """End a job within one step; any thread, at any time, also twice or after its end."""
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def drain(self) -> None:
        """Refuse new jobs from now on and wait until those there have ended."""
        raise NotImplementedError

    def stop(self) -> None:
        """End all jobs with `Failure("stopping")`, and the thread."""
        raise NotImplementedError

    @property
    def status(self) -> Status:
        raise NotImplementedError
