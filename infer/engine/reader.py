"""Compute the logits of every position of many rows, some columns at a time, and scores of them.

B rows, T columns, V vocabulary. However long the rows are, only the logits of B x T positions are
in memory, at most `POSITIONS` (with more rows than that, T is 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, KVCache, forward
from glm2_jax.cli.messages import Progress
from glm2_jax.errors import CheckpointError
from glm2_jax.mesh import constrain
from glm2_jax.model import hidden, logits_of
from glm2_jax.runtime.buckets import SMALLEST_BUCKET, bucket
from glm2_jax.runtime.devices import device_errors
from glm2_jax.runtime.gather import gathered
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
    whole = engine.config.block.bidirectional
    columns = -(-size // width) * width
    tokens, real = np.zeros((batch, columns), np.int32), np.zeros((batch, columns), bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], real[row, : len(ids)] = ids, True
    explain = partial(
        when_answering, engine.config, engine.checkpoint.params, engine.device,
        context=size, batch=batch, chunk=(columns if whole else width) * batch,
        kv=engine.executor.kv,
    )  # fmt: skip
    with device_errors(f"{batch} rows of up to {size} tokens", explain):
        compute = (_from_states if whole else _from_cache)(engine, tokens, real, size, width)
        for start in range(0, max(map(len, rows)), width):
            yield Chunk(start, compute(start), real[:, start : start + width])


def _from_cache(
    engine: Engine, tokens: np.ndarray, real: np.ndarray, size: int, width: int
) -> Callable[[int], jax.Array]:
    """Return what reads the next `width` columns, given the first of them, into a cache."""
    cache, key = engine.executor.new_cache(len(tokens), size), (len(tokens), width, size)

    def compute(start: int) -> jax.Array:
        nonlocal cache
        parts = (x[:, start : start + width] for x in (tokens, real))
        logits, cache = engine.programs.call(
            "logits", key, partial(_logits, engine.config), engine.checkpoint.params, *parts, cache,
            donate=3,
        )  # fmt: skip
        return logits

    return compute


def _from_states(
    engine: Engine, tokens: np.ndarray, real: np.ndarray, size: int, width: int
) -> Callable[[int], jax.Array]:
    """Return what makes logits of `width` columns, given the first of them, from hidden states: a
    context whose tokens see each other is read at once."""
    call, params, key = engine.programs.call, engine.checkpoint.params, (*tokens.shape, size, width)
    states = call("states", key, partial(_states, engine.config), params, tokens, real)
    part = partial(_part, engine.config, width)
    return lambda start: call("logits", key, part, params, states, np.int32(start))


def finite(values: np.ndarray) -> np.ndarray:
    """Return values that logits gave; CheckpointError for NaN or Inf."""
    if not np.isfinite(values).all():
        raise CheckpointError(
            "the model produced NaN or Inf",
            "The weights are damaged, or their values do not fit the dtype.",
            "Check the checkpoint's files, or use --dtype float32 or bfloat16.",
        )
    return values


class Item(NamedTuple):
    """A sequence of token ids, and which of them count; the first one never does."""

    ids: Sequence[int]
    counted: Sequence[bool]


def log_probs(engine: Engine, items: Sequence[Item], batch: int) -> np.ndarray:
    """Return float64 [items]: the log-probabilities of the tokens that count, summed in each.

    CheckpointError: NaN or Inf in the logits.
    """
    result = np.zeros(len(items))
    for numbers, (chunk,) in read_all([engine], [item.ids[:-1] for item in items], batch):
        nats, counts = nats_of(engine, [items[number] for number in numbers], chunk)
        found = np.where(counts, nats, 0).sum(axis=1, dtype=np.float64)
        result[numbers] -= found[: len(numbers)]
    return result


def score_answers(
    engine: Engine, prompt: Sequence[int], answers: Sequence[Sequence[int]], batch: int = 8
) -> list[float]:
    """Return the log-probability of each answer after a prompt, both as token ids: the sum over its
    tokens, without an end token. Errors as `log_probs`."""
    before = [False] * len(prompt)
    items = [Item([*prompt, *ids], [*before, *[True] * len(ids)]) for ids in answers]
    return log_probs(engine, items, min(batch, len(items))).tolist()


def nats_of(engine: Engine, items: Sequence[Item], chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
    """Return the negative log-likelihood in nats of what follows each column of a chunk, float32
    [B, T], and whether it counts, bool [B, T]. CheckpointError: it is NaN or Inf where it counts.
    """
    tokens, counts = np.zeros(chunk.real.shape, np.int32), np.zeros(chunk.real.shape, bool)
    columns = slice(chunk.start + 1, chunk.start + 1 + chunk.real.shape[1])
    for row, item in enumerate(items):
        ids = item.ids[columns]
        tokens[row, : len(ids)], counts[row, : len(ids)] = ids, item.counted[columns]
    nats = gathered(
        engine.programs.call("nats", chunk.logits.shape, token_nats, chunk.logits, tokens)
    )
    finite(nats[counts])
    return nats, counts


def token_nats(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return -log softmax(logits)[token]: float32 [B, T, V], int32 [B, T] -> float32 [B, T]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _logits(
    config: GLMConfig, params: Any, tokens: jax.Array, real: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache | None]:
    return forward(config, params, tokens, segment_ids=real.astype(np.int32), cache=cache)


def _states(config: GLMConfig, params: Any, tokens: jax.Array, real: jax.Array) -> jax.Array:
    return hidden(config, params, tokens, segment_ids=real.astype(np.int32))


def _part(
    config: GLMConfig, width: int, params: Any, states: jax.Array, start: jax.Array
) -> jax.Array:
    states = jax.lax.dynamic_slice_in_dim(states, start, width, axis=1)
    return constrain(logits_of(config, params, states), "B", None, None)
