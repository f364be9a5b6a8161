"""One call of the engine: its rows as a batch of arrays, and the iterator over their tokens."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from glm2_jax.runtime.buckets import bucket, padded_batch
from infer.engine.params import SamplingParams
from infer.engine.rows import Row, TokenEvent
from infer.engine.sampling import Sampling, prompt_counts, seed_words
from infer.engine.stats import Stats, together
from infer.engine.steps import IDLE, STOP_IDS, Controls, Output, Part

ROOM = 256  # slots for the answer that a cache has at first


class Batch:
    """Rows that are answered together, as the programs take them: padded to a bucket on both axes.

    `chunk` tokens of all rows are read at once, or more where prompts must be read `whole`. A
    session's cache has the first `reused` ids of every prompt already; None = no session. B,
    `size`, is a multiple of `multiple`; the rows after the prompts' are empty.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        vocab_size: int,
        max_length: int,
        chunk: int,
        whole: bool = False,
        reused: int | None = None,
        multiple: int = 1,
    ):
        self.rows, self.reused = rows, reused
        self._vocab_size = vocab_size
        self.size = size = padded_batch(len(rows), multiple)
        if whole:
            longest = max(len(row.ids) for row in rows)
            chunk = max(chunk, size * bucket(longest, max_length))
        self.chunk = chunk
        longest = min(max(1, chunk // size), max_length)
        self.parts = parts([row.ids for row in rows], reused or 0, size, longest)
        # S at first, for the prompts and the beginning of the answers, and for the longest answers.
        self.cache_size = bucket(self.slots(ROOM), max_length)
        self.largest_cache = bucket(self.slots(max_length), max_length)
        self.controls = controls_of([*rows, *[None] * (size - len(rows))])

    @property
    def counts(self) -> np.ndarray:
        """int16 [B, V]: `sampling.prompt_counts` of the complete prompts."""
        return prompt_counts([row.ids for row in self.rows], self.size, self._vocab_size)

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
        """Hand the output of one step, NumPy arrays, to the rows."""
        events = []
        for row in self.going:
            token = int(output.tokens[row.index])
            if token != IDLE:
                logprobs = output.logprobs and [array[row.index] for array in output.logprobs]
                events.append(row.take(token, logprobs))
        return events


def columns_of(output: Output) -> list[Output]:
    """Return the outputs of one step, or of several together, as one for each step."""
    if output.tokens.ndim == 1:
        return [output]
    return [jax.tree.map(lambda x, i=i: x[i], output) for i in range(len(output.tokens))]


def controls_of(rows: Sequence[Row | None]) -> Controls:
    """Return what the rows ask for as NumPy arrays; None = a row that is idle."""

    def each(value: Callable[[Row], Any], idle: Any, dtype: Any) -> np.ndarray:
        return np.array([idle if row is None else value(row) for row in rows], dtype)

    greedy, room = SamplingParams(temperature=0), [-1] * STOP_IDS
    return Controls(
        sampling=Sampling.of([greedy if row is None else row.sampling for row in rows]),
        seed=each(lambda row: seed_words(row.sampling.seed), seed_words(0), np.uint32),
        row_ids=each(lambda row: row.draw, 0, np.int32),
        limit=each(lambda row: row.answer.limit, 0, np.int32),
        stop_ids=each(lambda row: [*row.answer.stop_ids, *room][:STOP_IDS], room, np.int32),
        want_logprobs=each(lambda row: row.sampling.logprobs is not None, False, bool),
    )


def parts(prompts: Sequence[Sequence[int]], kept: int, batch: int, longest: int) -> list[Part]:
    """Cut prompts into parts of bounded size, which are read into the cache one after another.

    All parts but the last are `longest` wide, the last is a bucket of at most that. Every prompt
    ends in the last part, where the first token of its answer is drawn; a short prompt is empty in
    those before. The cache has the first `kept` ids of every prompt already.
    """
    rows = [list(ids[kept:]) for ids in prompts]
    most = max(map(len, rows))
    count = (most - 1) // longest
    last = bucket(most - count * longest, longest)
    starts = np.zeros(batch, np.int32)
    starts[: len(rows)] = kept
    result = []
    for index in range(count + 1):
        width = longest if index < count else last
        tokens, lengths = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
        for row, ids in enumerate(rows):
            until = len(ids) if index == count else max(len(ids) - last, 0)
            ids = ids[starts[row] - kept : until][:width]
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        result.append(Part(tokens, lengths, starts.copy()))
        starts += lengths
    return result


class Call(Iterator[TokenEvent]):
    """The tokens of a call as they come; it may be left at any time, or closed."""

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
        """Statistics of the rows together, as far as the call has gone."""
        return together(row.stats for row in self.rows)


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
