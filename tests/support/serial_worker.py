"""A stand-in for `infer.batching.worker.Worker`: the same interface, one job after another.

The real worker asks its queue between two steps of the model; here a test can hold the answer at a
token while jobs still come, leave and are cancelled.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from glm2_jax.errors import GLMError
from infer.batching.job import Busy, Event, Failure, Job
from infer.batching.options import BatchOptions
from infer.batching.worker import Status
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.engine.rows import Row

Script = Callable[[Row], Iterable[int]]  # the tokens that the model is said to write


class SerialWorker:
    """Answers jobs in one thread; `gate` stops it before each token while it is not set.

    No model runs: a `script` has the tokens.
    """

    def __init__(self, engine: Engine, options: BatchOptions, *, script: Script):
        self.engine, self.options, self.script = engine, options, script
        self.gate = threading.Event()
        self.gate.set()
        self.cancelled = 0  # how many jobs were
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._left: set[Job] = set()  # cancelled ones
        self._running: Job | None = None
        self._last_ids: Sequence[int] = ()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def warm(self) -> None:
        pass

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
        (row,) = self.engine.rows([ids], sampling, row_ids=[draw], clean=clean)
        return Job(row, listener, **more)

    def submit(self, *jobs: Job) -> None:
        with self._changed:
            if self._stopping or len(self._waiting) + len(jobs) > self.options.queue:
                raise Busy("the queue is full", retry_after=2.0)
            self._waiting += jobs
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        with self._changed:
            self._left.add(job)
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._running is None)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.gate.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def status(self) -> Status:
        running = int(self._running is not None)
        return Status(self.options.slots, running, len(self._waiting), 0.0, self._thread.is_alive())

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    break
                self._running = job = self._waiting.popleft()
            try:
                self._answer(job)
            except Exception as error:
                job.listener(Failure("device", GLMError(f"it failed: {error!r}")))
            with self._changed:
                self._running = None
                self._changed.notify_all()
        while self._waiting:
            self._end(self._waiting.popleft(), "stopping")

    def _answer(self, job: Job) -> None:
        row = job.row
        for token in self.script(row):
            self.gate.wait()
            if job in self._left:
                return self._end(job, "cancelled")
            if self._stopping:
                return self._end(job, "stopping")
            if job.deadline is not None and time.monotonic() > job.deadline:
                return self._end(job, "deadline")
            event = row.take(token, None)
            if row.tokens == 1:  # as if it had kept the prompt before
                pairs = zip(self._last_ids, row.ids[:-1], strict=False)
                same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
                row.stats.reused_tokens, self._last_ids = len(list(same)), row.ids
            job.listener(event)
            if event.completion is not None:
                return None
        raise GLMError("the script ended before the answer")

    def _end(self, job: Job, reason: str) -> None:
        self.cancelled += reason == "cancelled"
        job.listener(Failure(reason, GLMError(f"the request has ended: {reason}")))
