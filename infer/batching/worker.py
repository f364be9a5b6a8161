"""The one thread that owns the device: it runs a batcher on the jobs of other threads."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from glm2_jax.errors import GLMError
from infer.batching.batcher import Batcher
from infer.batching.job import Busy, Event, Failure, Job
from infer.batching.options import BatchOptions
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams


@dataclass(frozen=True)
class Status:
    """What a worker is doing now.

    `age` is the seconds since the last step ended, 0 while there is nothing to do; `alive` is
    whether the thread runs.
    """

    slots: int
    running: int
    waiting: int
    age: float
    alive: bool


class Worker:
    """Answers jobs in the slots of one batch, in a thread of its own.

    All methods may be called from any thread. Attributes: `engine`, `options`.
    """

    def __init__(self, engine: Engine, options: BatchOptions):
        self.engine, self.options = engine, options
        self._batcher = Batcher(engine, options)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # What other threads want of the batcher; it is done between two steps.
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._submitted = 0
        self._submitting = threading.Lock()
        self._draining = self._stopping = False
        self._stepped = time.monotonic()

    def warm(self) -> None:
        """Compile every program ahead, and run it once; before `start`."""
        self._batcher.warm()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def job(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        listener: Callable[[Event], None],
        *,
        draw: int = 0,
        clean: bool = False,
        **more: Any,
    ) -> Job:
        """Make a job of a prompt; `more` are attributes of `Job`.

        `ids`, `sampling`, `draw` (a `row_ids`), `clean` and errors are those of `Engine.run`.
        """
        (row,) = self.engine.rows([ids], sampling, row_ids=[draw], clean=clean)
        return Job(row, listener, **more)

    def submit(self, *jobs: Job) -> None:
        """Put jobs into the queue, all or none. Busy: there is no room, or the worker stops."""
        with self._submitting:
            if self._draining:
                raise Busy("the server is stopping", retry_after=10)
            room = self.options.slots + self.options.queue - self._open
            if len(jobs) > room:
                raise Busy(
                    f"there is no room for {len(jobs)} more requests"
                    f": {self._open} are running or waiting",
                    retry_after=self._estimate(),
                )
            self._submitted += len(jobs)
        for job in jobs:
            self._inbox.put(partial(self._batcher.submit, job))

    def cancel(self, job: Job) -> None:
        """End a job within one step; it may have ended."""
        self._inbox.put(partial(self._batcher.cancel, job))

    def drain(self) -> None:
        """Refuse new jobs from now on, and wait until those there have ended."""
        self._draining = True
        while self._open and self._thread.is_alive():
            time.sleep(0.05)

    def stop(self) -> None:
        """End all jobs with `Failure("stopping")`, and the thread."""
        self._draining = self._stopping = True
        self._inbox.put(lambda: None)
        self._thread.join()

    @property
    def status(self) -> Status:
        """What the worker is doing now."""
        running, count = self._batcher.scheduler.running, self._open
        age = time.monotonic() - self._stepped if count else 0.0
        waiting = max(count - running, 0)
        return Status(self.options.slots, running, waiting, age, self._thread.is_alive())

    def _estimate(self) -> float:
        """Return in how many seconds, 1 to 60, those that wait now may have a slot."""
        seconds = self.status.waiting / self.options.slots * self._batcher.answer_s
        return min(max(seconds, 1.0), 60.0)

    @property
    def _open(self) -> int:
        """How many jobs were submitted and have not ended."""
        return self._submitted - self._batcher.ended

    def _run(self) -> None:
        busy = True
        while not self._stopping:
            self._obey(wait=not busy)
            try:
                busy = self._batcher.step()
            except Exception as error:
                # An unexpected error must not leave the requests of all clients waiting for ever.
                traceback.print_exc()
                self._batcher.end_all(Failure("device", GLMError(f"internal error: {error!r}")))
            self._stepped = time.monotonic()
        self._batcher.end_all(Failure("stopping", GLMError("the server is stopping")))

    def _obey(self, *, wait: bool) -> None:
        """Do what other threads asked for; with `wait`, not before there is something."""
        with contextlib.suppress(queue.Empty):
            self._inbox.get(block=wait)()
            while True:
                self._inbox.get_nowait()()
