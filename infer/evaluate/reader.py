"""Compute the logits of every position of many rows, a few columns at a time.

B rows, T columns of a chunk, V vocabulary. However long the rows are, only the logits of B x T
positions are in memory, at most `POSITIONS` (with more rows than that, T is 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from glm2_jax import GLMConfig, KVCache, forward
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


class Reader:
    """Reads up to `batch` rows of up to `longest` tokens at once; each cache size, a power of two,
    is one program.

    Attributes:
        batch: B; on a mesh rounded up to a multiple of its data axes, with empty rows at the end.
    """

    def __init__(self, engine: Engine, batch: int, longest: int):
        rows = engine.executor.places.rows
        self.engine, self.batch, self.longest = engine, -(-batch // rows) * rows, longest
        most = max(POSITIONS // self.batch, 1)
        self.columns = min(1 << (most.bit_length() - 1), SMALLEST_BUCKET * 4)

    def read(self, rows: Sequence[Sequence[int]]) -> Iterator[Chunk]:
        """Yield the logits of at most `batch` rows.

        Raises (while iterating):
            DeviceError: out of memory.
        """
        engine, size = self.engine, bucket(max(map(len, rows)), self.longest)
        width = min(self.columns, size)
        explain = partial(
            when_answering,
            engine.config,
            engine.checkpoint.params,
            engine.device,
            context=size,
            batch=self.batch,
            chunk=width * self.batch,
        )
        with device_errors(f"{self.batch} rows of up to {size} tokens", explain):
            cache = engine.executor.new_cache(self.batch, size)
            for start in range(0, max(map(len, rows)), width):
                tokens = np.zeros((self.batch, width), np.int32)
                real = np.zeros((self.batch, width), bool)
                for row, ids in enumerate(rows):
                    part = ids[start : start + width]
                    tokens[row, : len(part)], real[row, : len(part)] = part, True
                logits, cache = engine.programs.call(
                    "logits",
                    (self.batch, width, size),
                    partial(_logits, engine.config),
                    engine.checkpoint.params,
                    tokens,
                    real,
                    cache,
                    donate=3,
                )
                yield Chunk(start, logits, real)


def _logits(
    config: GLMConfig, params: Any, tokens: jax.Array, real: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache | None]:
    return forward(config, params, tokens, segment_ids=real.astype(np.int32), cache=cache)
