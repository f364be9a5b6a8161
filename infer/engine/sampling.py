"""Drawing the next token: a pure function of logits, keys and per-row numbers.

Everything that a user can change (temperature, top-k, top-p, penalty, seed) is an array and not a
constant of the program, so a change never compiles anything, and the rows of a batch may differ.
B rows, V vocabulary entries. The user's side is `infer.engine.params.SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infer.engine.params import MAX_LOGPROBS, SamplingParams

# Sorting 65,024 scores costs more than ten milliseconds a row on a CPU, finding the largest few
# under one; the usual top-k (50) needs no more.
FEW = 128
# Below this a temperature is as good as greedy, and dividing by it could overflow.
_MIN_TEMPERATURE = 1e-6


class Sampling(NamedTuple):
    """Sampling parameters of each row of a batch, all [B]."""

    temperature: jax.Array | np.ndarray  # float32; 0 = greedy
    top_k: jax.Array | np.ndarray  # int32; 0 = off
    top_p: jax.Array | np.ndarray  # float32
    repetition_penalty: jax.Array | np.ndarray  # float32; 1 = off

    @classmethod
    def of(cls, params: Sequence[SamplingParams], batch: int) -> Sampling:
        """Return those of each row as NumPy arrays; rows after the last are greedy."""
        rows = [*params, *[SamplingParams(temperature=0)] * (batch - len(params))]
        most = np.iinfo(np.int32).max
        return cls(
            temperature=np.array([row.temperature for row in rows], np.float32),
            top_k=np.array([min(row.top_k, most) for row in rows], np.int32),
            top_p=np.array([row.top_p for row in rows], np.float32),
            repetition_penalty=np.array([row.repetition_penalty for row in rows], np.float32),
        )


def row_keys(seed: jax.Array, row_ids: jax.Array, step: jax.Array) -> jax.Array:
    """Return one random key per row: fold_in(fold_in(key(seed), row), step).

    So a row draws the same tokens alone and in a batch. `seed` is uint32 [B, 2] (`seed_words`),
    `row_ids` int32 [B], `step` int32 [B] or a scalar, how many tokens the answers have so far.
    """

    def key(seed: jax.Array, row: jax.Array, step: jax.Array) -> jax.Array:
        base = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(base, row), step)

    return jax.vmap(key)(seed, row_ids, jnp.broadcast_to(step, row_ids.shape))


def seed_words(seed: int) -> np.ndarray:
    """Return uint32 [2] for `row_keys`; below 2**32 the key equals `jax.random.key(seed)`."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.Array | np.ndarray) -> jax.Array:
    """Apply the repetition penalty, float32 [B], to logits [B, V]: divide those of tokens `seen` in
    the prompt or the answer, bool [B, V], and multiply negative ones."""
    penalty = penalty[:, None]
    changed = jnp.where(logits < 0, logits * penalty, logits / penalty)
    largest = jnp.finfo(jnp.float32).max  # an infinite score would turn into NaN later on
    return jnp.where(seen, jnp.clip(changed, -largest, largest), logits)


def ranked(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the `count` largest of each row of scores [B, V] in rising order, and their ids, both
    [B, count]; the lower id comes first among equals."""
    vocab = scores.shape[-1]
    if count == vocab:
        ids = jnp.argsort(scores, axis=-1, stable=True)
        return jnp.take_along_axis(scores, ids, axis=-1), ids.astype(jnp.int32)
    # top_k falls and has the lower id first, so take it of the mirror image, backwards. Without
    # the barrier XLA:CPU merges it with what follows and then sorts the complete row after all.
    # One barrier for both would have XLA:CPU abort, where rows are not cut over a mesh.
    largest, mirrored = map(jax.lax.optimization_barrier, jax.lax.top_k(scores[:, ::-1], count))
    return largest[:, ::-1], vocab - 1 - mirrored[:, ::-1].astype(jnp.int32)


def filter_ranked(scores: jax.Array, rows: Sampling) -> jax.Array:
    """Apply temperature, top-k and top-p, in this order; what is dropped becomes -inf.

    The softmax of the result is the distribution of transformers' warpers applied in their order.
    Ties: every token that ties with the k-th stays; among tokens that tie at the edge of top-p,
    those with the lower id are dropped first (as in a stable ascending sort). One always stays.

    `scores`, float32 [B, C], rise: all of the vocabulary, or the largest, if `few_enough`. A
    temperature of 0 counts as a tiny one. The result is shifted so that the last is 0.
    """
    temperature = jnp.maximum(rows.temperature, _MIN_TEMPERATURE)[:, None]
    scores = (scores - scores[:, -1:]) / temperature

    count = scores.shape[-1]
    top_k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, count), count)
    kth = jnp.take_along_axis(scores, (count - top_k)[:, None], axis=-1)
    scores = jnp.where(scores < kth, -jnp.inf, scores)

    top_p = rows.top_p[:, None]
    below = jnp.cumsum(jax.nn.softmax(scores, axis=-1), axis=-1)
    drop = ((below <= 1 - top_p) & (top_p < 1)).at[:, -1].set(False)
    return jnp.where(drop, -jnp.inf, scores)


def few_enough(scores: jax.Array, rows: Sampling) -> jax.Array:
    """Return whether the C largest scores, rising [B, C], have all that top-k keeps, and ties."""
    count = scores.shape[-1]
    kth = jnp.take_along_axis(scores, (count - jnp.clip(rows.top_k, 1, count))[:, None], axis=-1)
    inside = (rows.top_k > 0) & (kth[:, 0] > scores[:, 0])
    return jnp.all(inside | (rows.temperature == 0))


def sample(logits: jax.Array, keys: jax.Array, seen: jax.Array, rows: Sampling) -> jax.Array:
    """Draw one token a row, int32 [B]: penalty, then temperature, top-k, top-p, then the draw.

    Rows of temperature 0 take the largest penalized logit (the lowest id among equals). A batch of
    only such rows skips ranking and random numbers, and one whose top-k is small skips sorting the
    vocabulary: all in the same program, and with the same result. `logits` are float32 [B, V],
    `seen` is bool [B, V].
    """
    vocab = logits.shape[-1]
    scores = penalize(logits, seen, rows.repetition_penalty)
    greedy = jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def draw(candidates: tuple[jax.Array, jax.Array]) -> jax.Array:
        kept, ids = filter_ranked(candidates[0], rows), candidates[1]
        # The noise belongs to the token and not to its rank: any number of candidates draws alike.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,), jnp.float32))(keys)
        best = jnp.argmax(kept + jnp.take_along_axis(noise, ids, axis=-1), axis=-1)
        drawn = jnp.take_along_axis(ids, best[:, None], axis=-1)[:, 0]
        return jnp.where(rows.temperature > 0, drawn, greedy)

    def draw_any() -> jax.Array:
        few = ranked(scores, min(FEW, vocab))
        if vocab <= FEW:
            return draw(few)
        return jax.lax.cond(
            few_enough(few[0], rows), lambda: draw(few), lambda: draw(ranked(scores, vocab))
        )

    return jax.lax.cond(jnp.any(rows.temperature > 0), draw_any, lambda: greedy)


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities under the unfiltered model."""

    chosen: jax.Array  # float32 [B]
    top: jax.Array  # float32 [B, MAX_LOGPROBS], falling
    top_ids: jax.Array  # int32 [B, MAX_LOGPROBS]


def token_logprobs(logits: jax.Array, tokens: jax.Array, wanted: jax.Array) -> Logprobs:
    """Return log-softmax of the raw logits [B, V], before penalty, temperature, top-k and top-p.

    `tokens`, int32 [B], are those drawn. If no row has `wanted` any, bool [B], zeros come back and
    nothing is computed.
    """
    batch, vocab = logits.shape
    count = min(MAX_LOGPROBS, vocab)

    def compute() -> Logprobs:
        logp = jax.nn.log_softmax(logits, axis=-1)
        top, ids = jax.lax.top_k(logp, count)
        return Logprobs(
            jnp.take_along_axis(logp, tokens[:, None], axis=-1)[:, 0], top, ids.astype(jnp.int32)
        )

    def nothing() -> Logprobs:
        empty = jnp.zeros((batch, count), jnp.float32)
        return Logprobs(jnp.zeros(batch, jnp.float32), empty, empty.astype(jnp.int32))

    return jax.lax.cond(jnp.any(wanted), compute, nothing)
