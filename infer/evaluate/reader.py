"""Compute the logits of every position of many rows, some columns at a time.

B rows, T columns, V vocabulary. However long the rows are, only the logits of B x T positions are
in memory, at most `POSITIONS` (with more rows than that, T is 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from glm2_jax import GLMConfig, KVCache, forward
from glm2_jax.cli.messages import Progress
from glm2_jax.errors import CheckpointError
from glm2_jax.runtime.buckets import SMALLEST_BUCKET, bucket
from glm2_jax.runtime.devices import device_errors
from infer.memory.shortage import when_answering

if TYPE_CHECKING:
    from infer.engine.engine import Engine

POSITIONS = 512  # 133 MB of logits with a vocabulary of 65,024


class Chunk(NamedTuple):
    """Some columns of all rows."""

    start: int  # the first column
    logits: jax.Array  # float32 [B, T, V], on the device; undefined after a row's end
    real: np.ndarray  # bool [B, T], whether a position belongs to a row


def read_all(
    engines: Sequence[Engine], rows: Sequence[Sequence[int]], batch: int
) -> Iterator[tuple[list[int], tuple[Chunk, ...]]]:
    """Read rows of token ids with each engine, the longest first: too little memory fails early.

    Yields the numbers of at most `batch` rows, and for the same columns a chunk of each engine.
    """
    longest = engines[0].max_length
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))

    def compiling() -> float:
        return sum(engine.programs.seconds for engine in engines)

    with Progress("tokens", sum(map(len, rows))) as bar:
        done, start = 0, bar.start - compiling()
        for first in range(0, len(order), batch):
            numbers = order[first : first + batch]
            ids = [rows[number] for number in numbers]
            reads = (read(engine, ids, batch, longest) for engine in engines)
            for chunks in zip(*reads, strict=True):
                yield numbers, chunks
                done += int(chunks[0].real.sum())
                bar.start = start + compiling()  # not part of the rate
                bar(done)


def read(
    engine: Engine, rows: Sequence[Sequence[int]], batch: int, longest: int
) -> Iterator[Chunk]:
    """Yield the logits of at most `batch` rows of at most `longest` ids; each cache size, a power
    of two, is one program. B is `batch`, on a mesh rounded up to a multiple of its data axes.
    DeviceError while iterating: out of memory.
    """
    split = engine.executor.places.rows
    batch = -(-batch // split) * split
    size = bucket(max(map(len, rows)), longest)
    most = max(POSITIONS // batch, 1)
    width = min(1 << (most.bit_length() - 1), SMALLEST_BUCKET * 4, size)
    config, params = engine.config, engine.checkpoint.params
    explain = partial(
        when_answering, config, params, engine.device,
        context=size, batch=batch, chunk=width * batch,
    )  # fmt: skip
    with device_errors(f"{batch} rows of up to {size} tokens", explain):
        cache = engine.executor.new_cache(batch, size)
        for start in range(0, max(map(len, rows)), width):
            tokens, real = np.zeros((batch, width), np.int32), np.zeros((batch, width), bool)
            for row, ids in enumerate(rows):
                part = ids[start : start + width]
                tokens[row, : len(part)], real[row, : len(part)] = part, True
            key, compute = (batch, width, size), partial(_logits, config)
            logits, cache = engine.programs.call(
                "logits", key, compute, params, tokens, real, cache, donate=3
            )
            yield Chunk(start, logits, real)


def finite(values: np.ndarray) -> np.ndarray:
    """Return values that logits gave; CheckpointError for NaN or Inf."""
    if not np.isfinite(values).all():
        raise CheckpointError(
            "the model produced NaN or Inf",
            "The weights are damaged, or their values do not fit the dtype.",
            "Check the checkpoint's files, or use --dtype float32 or bfloat16.",
        )
    return values


def _logits(
    config: GLMConfig, params: Any, tokens: jax.Array, real: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache | None]:
    return forward(config, params, tokens, segment_ids=real.astype(np.int32), cache=cache)
