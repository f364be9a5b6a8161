"""One call of the engine: its rows as a batch of arrays, and the iterator over their tokens."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from glm2_jax.runtime.buckets import bucket, padded_batch
from infer.engine.parts import ROOM, parts
from infer.engine.rows import Row, TokenEvent
from infer.engine.sampling import Sampling, seed_words
from infer.engine.stats import Stats, together
from infer.engine.steps import IDLE, Controls, Output

AnyGenerator = TypeVar("AnyGenerator", bound=Generator[Any, None, None])
_open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def closed_at_exit(generator: AnyGenerator) -> AnyGenerator:
    """Have a generator closed before Python takes its modules apart, and return it.

    One that was left early, and is still referenced when Python ends, would otherwise be closed
    when the names that its clean-up uses are gone, and an exception would be printed.
    """
    _open.add(generator)
    return generator


@atexit.register
def _close_all() -> None:
    for generator in list(_open):
        with contextlib.suppress(ValueError):  # another thread runs it
            generator.close()


class Batch:
    """Rows that are answered together, as the programs take them: padded to a bucket on both axes.

    Args:
        chunk: tokens of all rows that are read at once.
        reused: ids at the beginning of every prompt that are in the cache already.
        multiple: what B has to be a multiple of.

    Attributes:
        rows: one for each prompt.
        size: B; the rows after the prompts' are empty.
        chunk, reused: the arguments.
        parts: what has to be read.
        cache_size: S at first: a bucket that holds the prompts and the beginning of the answers.
        largest_cache: S that holds the longest answers.
        controls: what every step takes.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        vocab_size: int,
        stop_ids: Sequence[int],
        max_length: int,
        chunk: int,
        reused: int = 0,
        multiple: int = 1,
    ):
        self.rows, self.chunk, self.reused = rows, chunk, reused
        self._vocab_size = vocab_size
        self.size = size = padded_batch(len(rows), multiple)
        longest = min(max(1, chunk // size), max_length)
        self.parts = parts([row.ids for row in rows], reused, size, longest)
        self.cache_size = bucket(self.slots(ROOM), max_length)
        self.largest_cache = bucket(self.slots(max_length), max_length)

        def padded(values: Sequence[Any], dtype: Any) -> np.ndarray:
            array = np.zeros((size, *np.shape(values[0])), dtype)
            array[: len(rows)] = values
            return array

        self.controls = Controls(
            sampling=Sampling.of([row.sampling for row in rows], size),
            seed=padded([seed_words(row.sampling.seed) for row in rows], np.uint32),
            row_ids=padded([row.draw for row in rows], np.int32),
            limit=padded([row.answer.limit for row in rows], np.int32),
            stop_ids=np.array(stop_ids, np.int32),
            want_logprobs=padded([row.sampling.logprobs is not None for row in rows], bool),
        )

    @property
    def seen(self) -> np.ndarray:
        """bool [B, V]: the tokens of each row's complete prompt."""
        seen = np.zeros((self.size, self._vocab_size), bool)
        for row in self.rows:
            seen[row.index, row.ids] = True
        return seen

    @property
    def going(self) -> list[Row]:
        """The rows that have not ended."""
        return [row for row in self.rows if not row.ended]

    @property
    def keep(self) -> np.ndarray:
        """bool [B]: the rows that have not ended; the device may know of fewer."""
        keep = np.zeros(self.size, bool)
        keep[[row.index for row in self.going]] = True
        return keep

    @property
    def drawn(self) -> int:
        """The most tokens that a row has drawn that has not ended."""
        return max((row.tokens for row in self.going), default=0)

    @property
    def steps_wanted(self) -> int:
        """The most tokens that a row may still come to; 0 when all have ended."""
        return max((row.answer.limit for row in self.going), default=0)

    def slots(self, tokens: int) -> int:
        """Return the cache slots that a row needs until all have drawn `tokens` tokens."""
        return max((row.slots(tokens) for row in self.going), default=0)

    def take(self, output: Output) -> list[TokenEvent]:
        """Hand the output of one step, NumPy arrays, to the rows.

        Raises:
            CheckpointError: the model produced NaN or Inf.
        """
        events = []
        for row in self.going:
            token = int(output.tokens[row.index])
            if token != IDLE:
                logprobs = output.logprobs and [array[row.index] for array in output.logprobs]
                events.append(row.take(token, logprobs))
        return events


class Call(Iterator[TokenEvent]):
    """The tokens of a call as they come; it may be left at any time, or closed.

    Attributes:
        rows: one for each prompt.
        stats: statistics of the rows together, as far as the call has gone.
    """

    def __init__(self, events: Generator[TokenEvent, None, None], rows: Sequence[Row]):
        self._events, self.rows = closed_at_exit(events), rows

    def __next__(self) -> TokenEvent:
        return next(self._events)

    def close(self) -> None:
        """End the call; ValueError while another thread is reading from it."""
        self._events.close()

    @property
    def closed(self) -> bool:
        return inspect.getgeneratorstate(self._events) == inspect.GEN_CLOSED

    @property
    def stats(self) -> Stats:
        return together(row.stats for row in self.rows)
