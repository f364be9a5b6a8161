"""A conversation that keeps its cache: only what is new in a prompt is read."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator, Sequence

from glm2_jax import KVCache
from glm2_jax.errors import UsageError
from infer.engine.call import Call
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.engine.rows import TokenEvent
from infer.engine.scheduler import Scheduler


class Session:
    """Answers one prompt after another with the tokens that `Engine.run` would give.

    The keys and values of the last prompt and its answer stay on the device. As far as the next
    prompt begins with the same ids they are not computed again: the next turn of a conversation,
    a question that is asked again and a history that was edited or cut all go the same way. The
    model always sees the complete prompt, so a wrong guess is not possible, only a slower start.
    Where the context is bidirectional, nothing can be kept: all of it sees what is new.

    Attributes:
        engine: what it answers with.
        ids: the token ids whose keys and values are in the cache.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.ids: list[int] = []
        self._cache: KVCache | None = None  # None also while a call has it
        self._call: Call | None = None
        self._thread = threading.current_thread()  # that made the call
        self._lock = threading.Lock()

    def run(
        self, ids: Sequence[int], sampling: SamplingParams, *, draw: int = 0, clean: bool = False
    ) -> Call:
        """Answer a prompt, yielding every token as it comes.

        The iterator may be left at any time; the next call closes it.

        Args:
            ids: the complete prompt.
            draw: which of the answers that the seed stands for, one of the `row_ids` of
                `Engine.run`.
            clean: as in `Engine.run`.

        Raises: what `Engine.run` raises, and UsageError while another thread has an answer that is
            not finished. The session can be used after every error.
        """
        with self._lock:
            asked = self._thread
            if self._call is not None and asked is not threading.current_thread():
                if asked.is_alive() and not self._call.closed:  # it is reading the answer
                    raise _in_use(f"another thread, {asked.name}")
            self.close()
            scheduler = self.engine.schedule(
                [ids], sampling, row_ids=[draw], clean=clean, reused=self._reusable(ids)
            )
            self._call = Call(self._run(scheduler), scheduler.batch.rows)
            self._thread = threading.current_thread()
            return self._call

    def close(self) -> None:
        """End the last answer if it is not finished; UsageError while a thread is reading it."""
        if self._call is not None:
            try:
                self._call.close()
            except ValueError:  # it runs in a thread that it was handed to
                raise _in_use("another thread") from None

    def _reusable(self, ids: Sequence[int]) -> int:
        """Count the ids at the beginning that are in the cache; the last one has to be read."""
        if self.engine.config.block.bidirectional:
            return 0
        pairs = zip(self.ids, ids[:-1], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _run(self, scheduler: Scheduler) -> Generator[TokenEvent, None, None]:
        (row,) = scheduler.batch.rows
        tokens, cache = [], self._cache
        self._forget()  # the cache is used up from here on
        for state, events in scheduler.steps(cache):
            tokens += [event.token for event in events if event.token is not None]
            # The last token read may not be in the cache yet, those before it are.
            self._cache, self.ids = state.cache, [*row.ids, *tokens[: row.tokens - 1]]
            yield from events
            if not row.ended:  # the next step uses the cache up; it may fail
                self._forget()

    def _forget(self) -> None:
        self._cache, self.ids = None, []


def _in_use(thread: str) -> UsageError:
    return UsageError(
        f"the session is answering in {thread}",
        "It holds one conversation, which answers one question at a time.",
        "Read that answer to its end, or close its iterator.",
    )
