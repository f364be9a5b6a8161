"""Drawing the next token: a pure function of logits, keys and per-row numbers.

Everything that a user can change (temperature, top-k, top-p, penalties, seed) is an array and not a
constant of the program, so a change never compiles anything, and the rows of a batch may differ.
Nothing is sorted: sorting a vocabulary takes longer than everything else here, also to compile.
B rows, V vocabulary entries. The user's side is `infer.engine.params.SamplingParams`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infer.engine.params import MAX_BIASES, MAX_LOGPROBS, SamplingParams

# Below this a temperature is as good as greedy, and dividing by it could overflow.
_MIN_TEMPERATURE = 1e-6
# Occurrences of a token in an answer are counted up to here: int16 holds twice as many, and drafts.
_MOST = 16_000

EVERY = np.uint32(0xFFFFFFFF)  # 32 tokens that are all allowed

Array = Any  # jax.Array, or numpy.ndarray on its way into a program


class Sampling(NamedTuple):
    """Sampling parameters of each row of a batch, all [B] but the biases."""

    temperature: Array  # float32; 0 = greedy
    top_k: Array  # int32; 0 = off
    top_p: Array  # float32; 1 = off
    repetition_penalty: Array  # float32; 1 = off
    presence_penalty: Array  # float32; 0 = off
    frequency_penalty: Array  # float32; 0 = off
    bias_ids: Array  # int32 [B, MAX_BIASES]; -1 = none
    bias: Array  # float32 [B, MAX_BIASES], added to the logits of these ids

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> Sampling:
        """Return those of each row as NumPy arrays."""
        most = np.iinfo(np.int32).max
        bias_ids = np.full((len(rows), MAX_BIASES), -1, np.int32)
        bias = np.zeros((len(rows), MAX_BIASES), np.float32)
        for index, row in enumerate(rows):
            for place, (token, added) in enumerate(row.logit_bias):
                bias_ids[index, place], bias[index, place] = token, added
        return cls(
            temperature=np.array([row.temperature for row in rows], np.float32),
            top_k=np.array([min(row.top_k, most) for row in rows], np.int32),
            top_p=np.array([row.top_p for row in rows], np.float32),
            repetition_penalty=np.array([row.repetition_penalty for row in rows], np.float32),
            presence_penalty=np.array([row.presence_penalty for row in rows], np.float32),
            frequency_penalty=np.array([row.frequency_penalty for row in rows], np.float32),
            bias_ids=bias_ids,
            bias=bias,
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


def prompt_counts(prompts: Sequence[Sequence[int]], batch: int, vocab: int) -> np.ndarray:
    """Return the counts, int16 [B, V], of rows that have prompts and no answer yet.

    The low bit of a count says whether the token is in the prompt, the rest how often it is in the
    answer.
    """
    counts = np.zeros((batch, vocab), np.int16)
    for row, ids in enumerate(prompts):
        counts[row, list(ids)] = 1
    return counts


def counted(counts: jax.Array, tokens: jax.Array, real: jax.Array) -> jax.Array:
    """Return the counts [B, V] with one more of each of the answers' tokens [B, N] that are `real`,
    bool [B, N]."""

    def row(counts: jax.Array, tokens: jax.Array, real: jax.Array) -> jax.Array:
        more = real & (counts[tokens] < 2 * _MOST)
        return counts.at[tokens].add(2 * more.astype(counts.dtype))

    return jax.vmap(row)(counts, tokens, real)


def adjust(
    logits: jax.Array, counts: jax.Array, rows: Sampling, allowed: jax.Array | None = None
) -> jax.Array:
    """Return the scores, float32 [B, V]: the logits with biases, then penalties; -inf for tokens
    that are not `allowed`, one bit each, uint32 [B, V / 32] (None = all are)."""
    vocab = logits.shape[-1]
    changed = (rows.repetition_penalty != 1) | (rows.presence_penalty != 0)
    changed |= rows.frequency_penalty != 0
    changed = changed | jnp.asarray(rows.bias_ids >= 0).any(axis=-1)
    if allowed is not None:
        changed |= jnp.asarray(allowed != EVERY).any(axis=-1)

    def adjusted() -> jax.Array:
        ids = jnp.where(rows.bias_ids < 0, vocab, rows.bias_ids)  # past the end: dropped
        scores = jax.vmap(lambda row, ids, bias: row.at[ids].add(bias, mode="drop"))(
            logits, ids, rows.bias
        )
        scores = penalize(scores, counts, rows)
        if allowed is None:
            return scores
        bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return jnp.where(bits.reshape(len(bits), -1)[:, :vocab] > 0, scores, -jnp.inf)

    return jax.lax.cond(jnp.any(changed), adjusted, lambda: logits)


def penalize(scores: jax.Array, counts: jax.Array, rows: Sampling) -> jax.Array:
    """Apply the penalties to scores [B, V].

    The repetition penalty divides the scores of tokens in the prompt or the answer, and multiplies
    negative ones. The presence penalty is subtracted once for a token in the answer, the frequency
    penalty as often as the token is there.
    """
    repetition, presence, frequency = (
        jnp.asarray(penalty)[:, None]
        for penalty in (rows.repetition_penalty, rows.presence_penalty, rows.frequency_penalty)
    )
    repeated = jnp.where(scores < 0, scores * repetition, scores / repetition)
    times = jnp.minimum(counts >> 1, _MOST).astype(jnp.float32)
    scores = jnp.where(counts > 0, repeated, scores)
    scores -= presence * (times > 0) + frequency * times
    largest = jnp.finfo(jnp.float32).max  # an infinite score would turn into NaN later on
    return jnp.clip(scores, -largest, largest)


def sample(
    logits: jax.Array,
    keys: jax.Array,
    counts: jax.Array,
    rows: Sampling,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """Draw one token a row, int32 [B]: biases and penalties, temperature, top-k, top-p, the draw.

    Rows of temperature 0 take the largest score (the lowest id among equals). What no row of the
    batch uses is skipped, in the same program and with the same result. `logits` are float32
    [B, V], `counts` those of `prompt_counts`; `allowed` is as in `adjust`.
    """
    scores = adjust(logits, counts, rows, allowed)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    ids = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    # Several times faster than argmax on a CPU. NaN equals nothing; the row is given up later on.
    greedy = jnp.min(jnp.where(scores == largest, ids, ids[-1]), axis=-1)

    def draw() -> jax.Array:
        uniform = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys)
        drawn = locate(filtered_weights(scores - largest, rows), uniform)
        return jnp.where(rows.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: greedy)


def filtered_weights(scores: jax.Array, rows: Sampling) -> jax.Array:
    """Apply temperature, top-k and top-p, in this order; return the weight of each token, 0 where
    it is dropped, float32 [B, blocks, tokens of a block] (see `_blocks`).

    The weights are proportional to the distribution of transformers' warpers applied in their
    order. Ties: every token that ties with the k-th stays; among tokens that tie at the edge of
    top-p, those with the lower id are dropped first (as in a stable ascending sort). One always
    stays. `scores`, float32 [B, V], are shifted so that the largest is 0; a temperature of 0 counts
    as a tiny one.
    """
    vocab = scores.shape[-1]
    temperature = jnp.maximum(rows.temperature, _MIN_TEMPERATURE)[:, None]
    scores = _blocks(scores / temperature)
    weights = jnp.exp(scores)
    # The order of float32 numbers that are not negative is that of their bits.
    depth = jax.lax.bitcast_convert_type(jnp.abs(scores), jnp.int32)
    draws = rows.temperature > 0
    k_filters = draws & (rows.top_k > 0) & (rows.top_k < vocab)
    p_filters = draws & (rows.top_p < 1)

    def largest_k() -> jax.Array:
        dropped = depth[0].size - jnp.where(k_filters, rows.top_k, depth[0].size)
        kth = _edge(depth, jnp.float32(1), dropped.astype(jnp.float32))
        return jnp.where(depth <= kth[:, None, None], weights, 0)

    weights = jax.lax.cond(jnp.any(k_filters), largest_k, lambda: weights)

    def nucleus() -> jax.Array:
        dropped = jnp.where(p_filters, 1 - rows.top_p, 0) * _total(weights)
        edge = _edge(depth, weights, dropped)[:, None, None]
        tied = depth == edge
        each = jnp.max(jnp.where(tied, weights, 0), axis=(1, 2))
        more = jnp.floor((dropped - _total(jnp.where(depth > edge, weights, 0))) / each)
        first = _find(tied.astype(jnp.float32), jnp.where(p_filters, more, 0))
        ids = jnp.arange(depth[0].size).reshape(depth[0].shape)
        stays = (depth < edge) | (tied & (ids >= first[:, None, None]))
        return jnp.where(stays, weights, 0)

    return jax.lax.cond(jnp.any(p_filters), nucleus, lambda: weights)


def locate(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Return the token at which the cumulative sum of the weights, [B, blocks, tokens], exceeds
    this share of the total, int32 [B]; never one of weight 0. `uniform` is float32 [B], 0 to 1."""
    return _find(weights, uniform * jnp.cumsum(jnp.sum(weights, axis=-1), axis=-1)[:, -1])


def _find(weights: jax.Array, target: jax.Array) -> jax.Array:
    """Return the first place at which the cumulative sum of the weights, [B, blocks, tokens],
    exceeds the `target` [B], or else the last that has a weight; int32 [B]."""
    sums = jnp.sum(weights, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    block = _first_beyond(sums, ends, target)
    row = jnp.arange(len(block))
    target -= (ends - sums)[row, block]
    inside = jax.vmap(lambda row, block: row[block])(weights, block)
    place = _first_beyond(inside, jnp.cumsum(inside, axis=-1), target)
    return block * weights.shape[-1] + place


def _first_beyond(weights: jax.Array, ends: jax.Array, target: jax.Array) -> jax.Array:
    """Return the first place of weight above 0 whose end exceeds the target [B], or else the last
    of weight above 0; `weights` and their cumulative sums, `ends`, are [B, N]."""
    places, count = jnp.arange(weights.shape[-1], dtype=jnp.int32), weights.shape[-1]
    # Sums are rounded, so an end may exceed the target although nothing was added there.
    first = jnp.min(jnp.where((weights > 0) & (ends > target[:, None]), places, count), axis=-1)
    last = jnp.max(jnp.where(weights > 0, places, 0), axis=-1)
    return jnp.minimum(first, last)


def _edge(depth: jax.Array, weights: jax.Array, dropped: jax.Array) -> jax.Array:
    """Return the largest depth at or below which there is more weight than `dropped`, int32 [B].

    `depth` is int32 [B, blocks, tokens], not negative; `weights` have that shape or none. The edge
    is found bit by bit, from the highest: the sum of what is at least as deep never rises.
    """

    def add_bit(index: jax.Array, edge: jax.Array) -> jax.Array:
        trial = edge | jnp.left_shift(1, 30 - index)
        weight = _total(jnp.where(depth >= trial[:, None, None], weights, 0))
        return jnp.where(weight > dropped, trial, edge)

    return jax.lax.fori_loop(0, 31, add_bit, jnp.zeros(len(depth), jnp.int32))


def _total(weights: jax.Array) -> jax.Array:
    """Return the sum of each row of [B, blocks, tokens]."""
    return jnp.sum(jnp.sum(weights, axis=1), axis=-1)  # in this order a CPU adds vectors


def _blocks(scores: jax.Array) -> jax.Array:
    """Return scores [B, V] cut into about as many blocks as a block has tokens, filled up with
    -inf: [B, blocks, tokens]."""
    vocab = scores.shape[-1]
    size = 2 ** math.ceil(math.log2(vocab) / 2)
    padded = jnp.pad(scores, ((0, 0), (0, -vocab % size)), constant_values=-jnp.inf)
    return padded.reshape(len(scores), -1, size)


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities under the unfiltered model, with any leading axes."""

    chosen: jax.Array  # float32 [B]
    top: jax.Array  # float32 [B, MAX_LOGPROBS], falling
    top_ids: jax.Array  # int32 [B, MAX_LOGPROBS]


def token_logprobs(logits: jax.Array, tokens: jax.Array, wanted: jax.Array) -> Logprobs:
    """Return log-softmax of the raw logits [B, V], before biases, penalties and filters.

    `tokens`, int32 [B], are those drawn. If no row has `wanted` any, bool [B], zeros come back and
    nothing is computed.
    """
    batch, vocab = logits.shape
    count = min(MAX_LOGPROBS, vocab)

    def nothing() -> Logprobs:
        empty = jnp.zeros((batch, count), jnp.float32)
        return Logprobs(jnp.zeros(batch, jnp.float32), empty, empty.astype(jnp.int32))

    return jax.lax.cond(jnp.any(wanted), lambda: _logprobs(logits, tokens), nothing)


def prompt_logprobs(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    """Return the log-probabilities of the prompts' next `tokens`, int32 [R, T], under the raw
    logits [R, T, V] that predict them; R prompts, T tokens."""
    flat = _logprobs(logits.reshape(tokens.size, -1), tokens.reshape(-1))
    return jax.tree.map(lambda x: x.reshape(*tokens.shape, *x.shape[1:]), flat)


def _logprobs(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    total = jax.nn.logsumexp(logits, axis=-1)
    top, ids = _largest(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return Logprobs(chosen - total, top - total[:, None], ids)


def _largest(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the largest scores of each row of [B, V], falling, and their ids, both [B, count].

    The lower id comes first among equals. `jax.lax.top_k` would sort all of them on a TPU.
    """

    def take(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, tuple[Any, Any]]:
        blocks, maxima = carry
        block = jnp.argmax(maxima, axis=-1)
        row = jax.vmap(lambda row, block: row[block])(blocks, block)
        place = jnp.argmax(row, axis=-1)
        rest = jnp.where(jnp.arange(row.shape[-1]) == place[:, None], -jnp.inf, row)
        blocks = jax.vmap(lambda row, block, rest: row.at[block].set(rest))(blocks, block, rest)
        here = jnp.arange(maxima.shape[-1]) == block[:, None]
        left = jnp.where(here, jnp.max(rest, axis=-1, keepdims=True), maxima)
        id_ = (block * row.shape[-1] + place).astype(jnp.int32)
        return (blocks, left), (jnp.max(row, axis=-1), id_)

    blocks = _blocks(scores)
    _, (values, ids) = jax.lax.scan(take, (blocks, jnp.max(blocks, axis=-1)), length=count)
    return values.T, ids.T
