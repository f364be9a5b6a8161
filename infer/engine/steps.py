"""The engine's programs: what reads tokens into the cache and returns logits, and what draws.

Pure functions of arrays. All of them draw with `pick`, so they draw the same tokens. It is compiled
apart from the model: once for each number of rows, whatever the sizes of the cache and the prompts.
B rows, T prompt length, N draft tokens, V vocabulary, S cache slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, KVCache, forward, last_logits
from glm2_jax.ideas import Idea, check
from glm2_jax.lora import choose_adapters, is_joined, with_lora
from infer.engine.sampling import (
    Array,
    Logprobs,
    Sampling,
    counted,
    prompt_logprobs,
    row_keys,
    sample,
    token_logprobs,
)

# In place of a token:
NOT_FINITE = -1  # the row's logits had NaN or Inf
IDLE = -2  # the row had already ended, or is padding

# Room for the ids that end a row: those of the model, and MAX_STOP_TOKEN_IDS of its own.
STOP_IDS = 20


class Part(NamedTuple):
    """A part of every prompt, padded on the right."""

    tokens: Array  # int32 [B, T]
    lengths: Array  # int32 [B], how many of them count; 0 = an empty row
    kept: Array  # int32 [B], tokens before them, which are in the cache


class Controls(NamedTuple):
    """What each row asks for; arrays, so that nothing recompiles when they change."""

    sampling: Sampling
    seed: Array  # uint32 [B, 2]
    row_ids: Array  # int32 [B], which random numbers a row draws
    limit: Array  # int32 [B], longest answer of each row
    stop_ids: Array  # int32 [B, STOP_IDS]; -1 = none
    want_logprobs: Array  # bool [B]


class State(NamedTuple):
    """What is passed from step to step; donated. The programs take the cache apart from it."""

    cache: KVCache | None
    token: Array  # int32 [B], drawn last, not yet in the cache
    counts: Array  # int16 [B, V], of tokens in the prompt and the answer, see `prompt_counts`
    active: Array  # bool [B]
    step: Array  # int32 [B], tokens drawn so far

    @classmethod
    def first(cls, part: Part, counts: Array) -> State:
        """Return the state before the first token of each row that is not empty in the part."""
        none = np.zeros_like(part.lengths)
        return cls(None, none, counts, part.lengths > 0, none)


class Output(NamedTuple):
    """What the host reads after a step: tokens, and log-probabilities where it wants them."""

    tokens: jax.Array  # int32 [B], or NOT_FINITE or IDLE
    logprobs: Logprobs | None


Stepped = tuple[State, Output]
Read = tuple[jax.Array, KVCache]  # logits, and the cache with all tokens


def prefill(config: GLMConfig, size: int, params: Any, part: Part, *, dtype: Any) -> Read:
    """Read the prompts into a new cache of `size` slots.

    Returns the logits of each row's last token, float32 [B, V], and the cache.
    """
    cache = KVCache.new(config, len(part.lengths), size, dtype, params.get("prefix"))
    return _read(config, params, part, cache)


def read(config: GLMConfig, params: Any, part: Part, cache: KVCache) -> KVCache:
    """Read a part of the prompts that is not their last into the cache."""
    return _read(config, params, part, _cut(cache, part))[1]


def extend(config: GLMConfig, params: Any, part: Part, cache: KVCache) -> Read:
    """Do as `prefill`, with the last part of the prompts and the cache that has those before."""
    return _read(config, params, part, _cut(cache, part))


def grow(size: int, cache: KVCache) -> KVCache:
    """Return a copy of the cache with more slots, the new ones zero."""
    more = (0, size - cache.size)

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [more if axis == 3 else (0, 0) for axis in range(x.ndim)])

    return dataclasses.replace(cache, **jax.tree.map(padded, {"k": cache.k, "v": cache.v}))


def fill(
    config: GLMConfig,
    view: int,
    params: Any,
    part: Part,
    rows: Array,
    adapters: Array | None,
    cache: KVCache,
) -> Read:
    """Do as `extend`, for these rows of the cache alone, int32 [R]; one past the end is empty.

    No more than `view` slots of them are used. `adapters`, int32 [R], are numbers of joined
    adapters, see `glm2_jax.lora`; None = the base model.
    """
    cut = _cut_rows(cache, part, rows)
    return _read(config, params, part, cut, rows=rows, view=view, adapters=adapters)


def score(
    config: GLMConfig,
    view: int,
    params: Any,
    part: Part,
    following: Array,
    rows: Array,
    adapters: Array | None,
    cache: KVCache,
) -> tuple[jax.Array, Logprobs, KVCache]:
    """Do as `fill`, and return the log-probabilities of the tokens that follow those of the part.

    `following` is int32 [R, T]; so are the axes of the log-probabilities.
    """
    logits, filled = forward(
        config,
        _adapted(params, adapters, part),
        part.tokens,
        segment_ids=_real(part).astype(jnp.int32),
        cache=_cut_rows(cache, part, rows),
        rows=jnp.asarray(rows),
        view=view,
    )
    last = jnp.maximum(part.lengths - 1, 0)
    ends = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
    return ends, prompt_logprobs(logits, following), cast(KVCache, filled)


def take(rows: Array, state: State) -> State:
    """Return R rows, int32 [R], of a state without a cache; one past the end is not active."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="fill", fill_value=0), state)


def insert(rows: Array, begun: State, state: State) -> State:
    """Put R rows that have begun into a state without a cache, at int32 [R]; past the end = not."""
    return jax.tree.map(lambda all_, new: all_.at[rows].set(new, mode="drop"), state, begun)


def decode(
    config: GLMConfig,
    view: int | None,
    params: Any,
    keep: Array,
    state: State,
    adapters: Array | None,
    rows: Array | None,
    cache: KVCache,
) -> Read:
    """Write the last token of each row into the cache; return the logits of the next, [B, V].

    `keep` is bool [B]; a row where it is false takes no part, even if it is active on the device,
    and may go on later. `view`, `adapters` and `rows` (None = all) are as in `fill`.
    """
    active = state.active & keep
    part = Part(state.token[:, None], active.astype(jnp.int32), jnp.zeros_like(state.token))
    return _read(config, params, part, cache, rows=rows, view=view, adapters=adapters)


def verify(
    config: GLMConfig, params: Any, keep: Array, state: State, drafts: Array, cache: KVCache
) -> Read:
    """Write the last token of each row and its draft, int32 [B, N], into the cache.

    Returns the logits after each of them, [B, N + 1, V], and a cache whose lengths are those from
    before, as `accept` decides which tokens count. `keep` is bool [B]; false ends a row.
    """
    tokens = jnp.concatenate([state.token[:, None], drafts], axis=1)
    active = state.active & keep
    segment_ids = jnp.broadcast_to(active[:, None], tokens.shape).astype(jnp.int32)
    # The last draft of an answer may exceed the cache: what is written there is dropped, and what
    # is drawn there exceeds the row's limit.
    logits, written = forward(config, params, tokens, segment_ids=segment_ids, cache=cache)
    written = cast(KVCache, written)
    return logits, dataclasses.replace(written, length=cache.length)


def draft(
    config: GLMConfig, params: Any, keep: Array, state: State, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Draft tokens after the last of each row, as the idea of the configuration does.

    Returns int32 [B, N], and a cache whose lengths are those from before: what the drafts wrote is
    overwritten when they are verified. `keep` is as in `decode`.
    """
    idea, active = config.idea, (state.active & keep).astype(jnp.int32)
    assert idea.draft is not None

    def step(token: jax.Array, cache: KVCache, idea: Idea) -> Read:
        part = Part(token[:, None], active, jnp.zeros_like(active))
        return _read(dataclasses.replace(config, idea=idea), params, part, cache)

    like = jax.ShapeDtypeStruct((len(active), idea.drafts), jnp.int32), cache
    found, written = check(idea.draft, idea.draft(step, state.token, cache), like)
    return found, dataclasses.replace(written, length=cache.length)


def pick(
    logits: jax.Array, controls: Controls, keep: Array, state: State, allowed: Array | None = None
) -> Stepped:
    """Draw a token for every active row from logits, float32 [B, V], and decide on the device which
    rows stay active.

    `keep` is as in `decode`; the state has no cache. `allowed` is uint32 [B, V / 32], a bit for
    each token that may be drawn; None = all.
    """
    takes_part = state.active & keep
    keys = row_keys(jnp.asarray(controls.seed), jnp.asarray(controls.row_ids), state.step)
    token = sample(logits, keys, state.counts, controls.sampling, allowed)
    logprobs = token_logprobs(logits, token, jnp.asarray(controls.want_logprobs))
    finite = jnp.isfinite(logits).all(axis=-1)
    output = jnp.where(takes_part, jnp.where(finite, token, NOT_FINITE), IDLE)

    stopped = jnp.any(token[:, None] == controls.stop_ids, axis=-1)
    active = takes_part & finite & ~stopped & (state.step + 1 < controls.limit)
    counts = counted(state.counts, token[:, None], active[:, None])
    token = jnp.where(keep, jnp.where(active, token, 0), state.token)
    active = jnp.where(keep, active, state.active)
    state = State(None, token, counts, active, state.step + takes_part)
    return state, Output(output, logprobs)


def accept(
    logits: jax.Array,
    controls: Controls,
    keep: Array,
    drafts: Array,
    length: jax.Array,
    state: State,
) -> tuple[State, Output, jax.Array]:
    """Draw 1 to N + 1 tokens for each row: as many as agree with its draft, and the next.

    `logits` are those of `verify`, `length` int32 [B] that of its cache. The output has a leading
    axis of N + 1; a row is IDLE after its last token. Also returns the new length of the cache.
    """
    batch, columns = logits.shape[:2]
    state = state._replace(active=state.active & keep)

    # Every column draws as a row, [B (N + 1)], as if all drafts before it had been drawn.
    spread = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), columns, axis=0), controls)
    flat = logits.reshape(batch * columns, -1)
    picked, output = pick(flat, spread, True, _columns(state, drafts))
    picked, output = jax.tree.map(
        lambda x: x.reshape(batch, columns, *x.shape[1:]), (picked, output)
    )
    agrees = picked.active[:, :-1] & (output.tokens[:, :-1] == drafts)
    reached = jnp.concatenate([state.active[:, None], agrees], axis=1)
    reached = jnp.cumprod(reached.astype(jnp.int32), axis=1)
    drawn = jnp.sum(reached, axis=1, dtype=jnp.int32)

    last = jnp.maximum(drawn - 1, 0)
    state = jax.tree.map(lambda x: x[jnp.arange(batch), last], picked)
    output = output._replace(tokens=jnp.where(reached > 0, output.tokens, IDLE))
    # All that counts is in the cache but the token drawn last; the slots after it are free again.
    return state, jax.tree.map(lambda x: x.swapaxes(0, 1), output), length + drawn


def _columns(state: State, drafts: jax.Array) -> State:
    """Return the state at each column as if all drafts before it had been drawn: [B (N + 1)]."""
    batch, count = drafts.shape
    columns = count + 1
    spread: State = jax.tree.map(lambda x: jnp.repeat(x, columns, axis=0), state)
    before = jnp.tile(jnp.arange(count) < jnp.arange(columns)[:, None], (batch, 1))
    return spread._replace(
        counts=counted(spread.counts, jnp.repeat(drafts, columns, axis=0), before),
        step=spread.step + jnp.tile(jnp.arange(columns, dtype=jnp.int32), batch),
    )


def _adapted(params: Any, adapters: Array | None, part: Part) -> Any:
    """Return the params with the adapters of these numbers for the rows, if they have joined ones;
    None = the base model."""
    if not is_joined(params):
        return params
    numbers = jnp.zeros_like(part.lengths) if adapters is None else jnp.asarray(adapters)
    return with_lora(params, choose_adapters(params["lora"], numbers))


def _read(
    config: GLMConfig,
    params: Any,
    part: Part,
    cache: KVCache,
    *,
    rows: Array | None = None,
    view: int | None = None,
    adapters: Array | None = None,
) -> Read:
    """Return the logits of each row's last token, and the cache with all tokens."""
    params = _adapted(params, adapters, part)
    last = jnp.maximum(part.lengths - 1, 0)
    segment_ids = _real(part).astype(jnp.int32)
    where = {"cache": cache, "rows": None if rows is None else jnp.asarray(rows), "view": view}
    logits, filled = last_logits(
        config, params, part.tokens, last, segment_ids=segment_ids, **where
    )
    return logits, cast(KVCache, filled)


def _cut(cache: KVCache, part: Part) -> KVCache:
    """Return the cache with the tokens before the part alone; the slots after them are free."""
    return dataclasses.replace(cache, length=cache.prefix + part.kept)


def _cut_rows(cache: KVCache, part: Part, rows: Array) -> KVCache:
    """Do as `_cut`, for these rows alone."""
    rows = jnp.asarray(rows)
    starts = cache.prefix.at[rows].get(mode="fill", fill_value=0) + part.kept
    length = cache.length.at[rows].set(starts, mode="drop")
    return dataclasses.replace(cache, length=length)


def _real(part: Part) -> jax.Array:
    """Return which tokens are not padding, bool [B, T]."""
    return jnp.arange(part.tokens.shape[1])[None, :] < part.lengths[:, None]
