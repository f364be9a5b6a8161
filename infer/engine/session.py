"""A conversation that keeps its cache: only what is new in a prompt is read."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Generator, Sequence
from functools import partial

from glm2_jax import KVCache
from glm2_jax.errors import UsageError
from infer.engine import steps
from infer.engine.call import Job, TokenEvent
from infer.engine.engine import Engine
from infer.engine.left import closed_at_exit
from infer.engine.params import SamplingParams
from infer.engine.stats import Clock


class Session:
    """Answers one prompt after another with the tokens that `Engine.run` would give.

    The keys and values of the last prompt and its answer stay on the device. As far as the next
    prompt begins with the same ids they are not computed again: a conversation that goes on, a
    question asked anew and a history that was edited or cut all go the same way. What the model
    reads is always the whole prompt, so a wrong guess is not possible, only a slower start.

    Attributes:
      engine: what it answers with; `engine.stats` tells the tokens read and reused.
      ids: the token ids whose keys and values are in the cache.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.ids: list[int] = []
        self._cache: KVCache | None = None  # None also while a call has it
        self._events: Generator[TokenEvent, None, None] | None = None
        self._thread: threading.Thread | None = None  # that asked for them
        self._lock = threading.Lock()

    def run(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        *,
        draw: int = 0,
        clean: bool = False,
    ) -> Generator[TokenEvent, None, None]:
        """Answers a prompt, yielding every token as it comes.

        The iterator may be left at any time; the next call closes it.

        Args:
          ids: the whole prompt.
          draw: which of the answers that the seed stands for, one of the `row_ids` of `Engine.run`.
          clean: as in `Engine.run`.

        Raises: what `Engine.run` raises, and UsageError while another thread has an answer that is
          not finished. The session can be used after every error.
        """
        with self._lock:
            self._check_thread()
            self.close()
            job = self.engine._job([ids], sampling, [draw], clean, self._reusable(ids))
            self._events = closed_at_exit(self._run(job, list(ids)))
            self._thread = threading.current_thread()
            return self._events

    def close(self) -> None:
        """Ends the last answer, where it is not finished; UsageError while a thread reads it."""
        if self._events is not None:
            try:
                self._events.close()
            except ValueError:  # it runs in a thread that it was handed to
                raise _in_use("another thread") from None

    def _check_thread(self) -> None:
        """Raises UsageError rather than end an answer that another thread is reading."""
        asked, current = self._thread, threading.current_thread()
        if self._events is None or asked is None or asked is current or not asked.is_alive():
            return
        if inspect.getgeneratorstate(self._events) != inspect.GEN_CLOSED:
            raise _in_use(f"another thread, {asked.name}")

    def _reusable(self, ids: Sequence[int]) -> int:
        """How many ids at the beginning are in the cache; the last one always has to be read."""
        count = 0
        for cached, wanted in zip(self.ids, ids[:-1], strict=False):
            if cached != wanted:
                break
            count += 1
        return count

    def _run(self, job: Job, ids: list[int]) -> Generator[TokenEvent, None, None]:
        clock, tokens = self.engine._clock(), []
        self.engine.stats.reused_tokens = len(ids) - job.prompt_tokens
        with self.engine._device_errors(job, f"a prompt of {len(ids)} tokens"):
            device = self.engine.executor
            kept = job.cache_size if self._cache is None else device.room(self._cache)
            self.engine._compile(job, partial(self._first, job, self._cache), kept=kept)
            for state, events in self.engine._loop(job, clock, *self._start(job, clock)):
                tokens += [event.token for event in events if event.token is not None]
                # The last token read may not be in the cache yet, those before it are.
                self._cache, self.ids = state.cache, ids + tokens[: job.steps_read - 1]
                yield from events
                if job.steps_wanted:  # the next step uses the cache up; it may fail
                    self._forget()

    def _start(self, job: Job, clock: Clock) -> tuple[steps.State, steps.Output]:
        """Reads what is new and draws the first token."""
        cache = self._cache
        self._forget()
        clock.prefill_starts()
        return self._first(job, cache)

    def _first(self, job: Job, cache: KVCache | None) -> tuple[steps.State, steps.Output]:
        device = self.engine.executor
        if cache is None:  # made apart, so that the first prompt needs no program of its own
            cache = device.empty_cache(job)
        return device.read(job, device.grow(cache, job.cache_size, job.largest_cache))

    def _forget(self) -> None:
        self._cache, self.ids = None, []


def _in_use(thread: str) -> UsageError:
    return UsageError(
        f"the session is answering in {thread}",
        "It holds one conversation, which answers one question at a time.",
        "Read that answer to its end, or close its iterator.",
    )
