"""The engine's programs: prefill, one decode step, many steps on the device, and verified drafts.

Pure functions of arrays. All of them draw with `pick`, so they draw the same tokens.
B rows, T prompt length, N draft tokens, V vocabulary, S cache slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from glm2_jax import GLMConfig, KVCache, forward, last_logits
from glm2_jax.mesh import active_mesh
from infer.engine.sampling import Logprobs, Sampling, row_keys, sample, token_logprobs

# In place of a token:
NOT_FINITE = -1  # the row's logits had NaN or Inf
IDLE = -2  # the row had already ended, or is padding

Array = Any  # jax.Array, or numpy.ndarray on its way into a program


class Part(NamedTuple):
    """A part of every prompt, padded on the right."""

    tokens: Array  # int32 [B, T]
    lengths: Array  # int32 [B], how many of them count; 0 = an empty row
    kept: Array  # int32 [B], tokens before them, which are in the cache


class Controls(NamedTuple):
    """What the rows ask for; arrays, so that nothing recompiles when they change."""

    sampling: Sampling
    seed: Array  # uint32 [B, 2]
    row_ids: Array  # int32 [B], which random numbers a row draws
    limit: Array  # int32 [B], longest answer of each row
    stop_ids: Array  # int32 [a few], of all rows
    want_logprobs: Array  # bool [B]


class State(NamedTuple):
    """What is passed from step to step; donated."""

    cache: KVCache | None  # None only in `verify`, for the columns of a row
    token: jax.Array  # int32 [B], drawn last, not yet in the cache
    seen: jax.Array  # bool [B, V], in the prompt or the answer
    active: jax.Array  # bool [B]
    step: jax.Array  # int32 [B], tokens drawn so far


class Output(NamedTuple):
    """What the host reads after a step: tokens, and log-probabilities where it wants them."""

    tokens: jax.Array  # int32 [B], or NOT_FINITE or IDLE
    logprobs: Logprobs | None


Stepped = tuple[State, Output]


def prefill(
    config: GLMConfig, size: int, params: Any, part: Part, controls: Controls, *, dtype: Any
) -> Stepped:
    """Read the prompts into a new cache of `size` slots and draw the first token of each row."""
    batch = len(part.lengths)
    cache = KVCache.new(config, batch, size, dtype, params.get("prefix"))
    logits, filled = _read(config, params, part, cache)
    seen = _marked(jnp.zeros((batch, config.vocab_size), bool), part.tokens, _real(part))
    return _first(logits, filled, seen, part, controls)


def read(config: GLMConfig, params: Any, part: Part, cache: KVCache) -> KVCache | None:
    """Read a part of the prompts that is not their last into the cache."""
    return _read(config, params, part, _cut(cache, part))[1]


def extend(
    config: GLMConfig, params: Any, part: Part, seen: Array, controls: Controls, cache: KVCache
) -> Stepped:
    """Read the last part of the prompts into the cache and draw the first token of each row.

    `seen` is bool [B, V], the tokens of the complete prompts.
    """
    logits, filled = _read(config, params, part, _cut(cache, part))
    return _first(logits, filled, jnp.asarray(seen), part, controls)


def grow(size: int, cache: KVCache) -> KVCache:
    """Return a copy of the cache with more slots, the new ones zero."""
    pad = [(0, 0)] * 3 + [(0, size - cache.size), (0, 0)]
    return KVCache(jnp.pad(cache.k, pad), jnp.pad(cache.v, pad), cache.length, cache.prefix)


def decode(
    config: GLMConfig, params: Any, controls: Controls, keep: Array, state: State
) -> Stepped:
    """Write the last token of each row into the cache and draw the next.

    `keep` is bool [B]; false ends a row, even if it is active on the device.
    """
    active = state.active & keep
    logits, cache = last_logits(
        config,
        params,
        state.token[:, None],
        jnp.zeros_like(state.token),
        segment_ids=active[:, None].astype(jnp.int32),
        cache=state.cache,
    )
    return pick(logits, controls, state._replace(cache=cache, active=active))


def decode_many(
    config: GLMConfig, count: int, params: Any, controls: Controls, keep: Array, state: State
) -> Stepped:
    """Take up to `count` steps without the host, fewer when every row has ended.

    The outputs have a leading axis of `count`; steps not taken are IDLE.
    """

    def step(carry):
        index, state, outputs = carry
        state, output = decode(config, params, controls, keep, state)
        outputs = jax.tree.map(lambda all_, one: all_.at[index].set(one), outputs, output)
        return index + 1, state, outputs

    def going(carry):
        return (carry[0] < count) & jnp.any(carry[1].active)

    one = jax.eval_shape(lambda: decode(config, params, controls, keep, state)[1])
    outputs = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), one)
    outputs = outputs._replace(tokens=jnp.full_like(outputs.tokens, IDLE))
    state = state._replace(active=state.active & keep)
    _, state, outputs = jax.lax.while_loop(going, step, (jnp.int32(0), state, outputs))
    return state, outputs


def pick(logits: jax.Array, controls: Controls, state: State) -> Stepped:
    """Draw a token for every active row from logits, float32 [B, V], and decide on the device which
    rows stay active."""
    keys = row_keys(jnp.asarray(controls.seed), jnp.asarray(controls.row_ids), state.step)
    token = sample(logits, keys, state.seen, controls.sampling)
    logprobs = token_logprobs(logits, token, jnp.asarray(controls.want_logprobs))
    finite = jnp.isfinite(logits).all(axis=-1)
    output = jnp.where(state.active, jnp.where(finite, token, NOT_FINITE), IDLE)

    stopped = jnp.any(token[:, None] == controls.stop_ids, axis=-1)
    active = state.active & finite & ~stopped & (state.step + 1 < controls.limit)
    seen = _marked(state.seen, token[:, None], active[:, None])
    state = State(state.cache, jnp.where(active, token, 0), seen, active, state.step + state.active)
    return state, Output(output, logprobs)


def verify(
    config: GLMConfig, params: Any, controls: Controls, keep: Array, state: State, drafts: Array
) -> Stepped:
    """Draw 1 to N + 1 tokens for each row: as many as agree with its draft, and the next.

    `keep` is as in `decode`, `drafts` int32 [B, N]. The output has a leading axis of N + 1; a row
    is IDLE after its last token.
    """
    before = cast(KVCache, state.cache)
    state = state._replace(active=state.active & keep)
    tokens = jnp.concatenate([state.token[:, None], drafts], axis=1)
    batch, columns = tokens.shape
    segment_ids = jnp.broadcast_to(state.active[:, None], tokens.shape).astype(jnp.int32)
    # The last draft of an answer may exceed the cache: what is written there is dropped, and what
    # is drawn there exceeds the row's limit.
    logits, cache = forward(config, params, tokens, segment_ids=segment_ids, cache=before)

    # Every column draws as a row, [B (N + 1)], as if all drafts before it had been drawn.
    spread = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), columns, axis=0), controls)
    spread = spread._replace(stop_ids=controls.stop_ids)
    picked, output = pick(logits.reshape(batch * columns, -1), spread, _columns(state, drafts))
    picked, output = jax.tree.map(
        lambda x: x.reshape(batch, columns, *x.shape[1:]), (picked, output)
    )
    agrees = picked.active[:, :-1] & (output.tokens[:, :-1] == drafts)
    reached = jnp.concatenate([state.active[:, None], agrees], axis=1)
    reached = jnp.cumprod(reached.astype(jnp.int32), axis=1)
    drawn = jnp.sum(reached, axis=1, dtype=jnp.int32)

    last = jnp.maximum(drawn - 1, 0)
    state = jax.tree.map(lambda x: x[jnp.arange(batch), last], picked)
    # All that counts is in the cache but the token drawn last; the slots after it are free again.
    written = cast(KVCache, cache)
    cache = KVCache(written.k, written.v, before.length + drawn, before.prefix)
    output = output._replace(tokens=jnp.where(reached > 0, output.tokens, IDLE))
    return state._replace(cache=cache), jax.tree.map(lambda x: x.swapaxes(0, 1), output)


def _columns(state: State, drafts: jax.Array) -> State:
    """Return the state at each column as if all drafts before it had been drawn: [B (N + 1)]."""
    batch, count = drafts.shape
    columns = count + 1
    seen = jnp.repeat(state.seen, columns, axis=0).reshape(batch, columns, -1)
    row, column = jnp.arange(batch)[:, None, None], jnp.arange(columns)[:, None]
    seen = seen.at[row, column, drafts[:, None]].max(jnp.arange(count) < column)
    step = state.step[:, None] + jnp.arange(columns, dtype=jnp.int32)
    token, active = (jnp.repeat(x, columns) for x in (state.token, state.active))
    return State(None, token, seen.reshape(batch * columns, -1), active, step.reshape(-1))


def _read(
    config: GLMConfig, params: Any, part: Part, cache: KVCache
) -> tuple[jax.Array, KVCache | None]:
    """Return the logits of each row's last token, and the cache with all tokens."""
    last = jnp.maximum(part.lengths - 1, 0)
    segment_ids = _real(part).astype(jnp.int32)
    return last_logits(config, params, part.tokens, last, segment_ids=segment_ids, cache=cache)


def _first(
    logits: jax.Array, cache: KVCache | None, seen: jax.Array, part: Part, controls: Controls
) -> Stepped:
    """Draw the first token of each row that is not empty."""
    none = jnp.zeros_like(part.lengths)
    return pick(logits, controls, State(cache, none, seen, part.lengths > 0, none))


def _cut(cache: KVCache, part: Part) -> KVCache:
    """Return the cache with the tokens before the part alone; the slots after them are free."""
    return KVCache(cache.k, cache.v, cache.prefix + part.kept, cache.prefix)


def _real(part: Part) -> jax.Array:
    """Return which tokens are not padding, bool [B, T]."""
    return jnp.arange(part.tokens.shape[1])[None, :] < part.lengths[:, None]


def _marked(seen: Array, tokens: Array, real: Array) -> jax.Array:
    """Return `seen` [B, V] with the tokens [B, T] that are real."""
    if active_mesh():  # so that the partitioner leaves each row where it is
        return jax.vmap(lambda row, ids, real: row.at[ids].max(real))(seen, tokens, real)
    return seen.at[jnp.arange(len(tokens))[:, None], tokens].max(real)
