"""What the layers need to know of the tokens: positions, visibility, slots of the cache."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from glm2_jax.attention import Visibility
from glm2_jax.blanks import Blanks, find_blanks
from glm2_jax.cache import KVCache
from glm2_jax.config import GLMConfig
from glm2_jax.prefix import Prefix
from glm2_jax.rope import rope_tables


@flax.struct.dataclass
class TokenContext:
    """What every layer needs to know of the tokens besides their activations."""

    # Of the rotary angles, float32 [B, T, A], see `rope_tables`; None without rotation.
    cos: jax.Array | None
    sin: jax.Array | None
    visible: Visibility  # the keys that each query sees: of the cache, else of prefix and tokens
    slots: jax.Array | None  # int32 [B, T], each token's cache slot; past the end = not written
    query_scale: jax.Array | None  # float32 [B, T, 1, 1]
    prefix: Prefix | None = None  # to be put before the tokens' keys; a cache holds it already
    rows: jax.Array | None = None  # int32 [B], the tokens' rows of the cache; None = all
    positions: jax.Array | None = None  # int32 [B, 2, T], of learned positions
    # How many slots of the cache are read, None = all.
    view: int | None = flax.struct.field(pytree_node=False, default=None)


class _Where(NamedTuple):
    """Where tokens are: in their row, in their text, and in the cache."""

    index: jax.Array  # int32 [B, T], of each token's own key
    positions: jax.Array  # int32 [B, T], or [B, 2, T] with block positions
    visible: Visibility
    slots: jax.Array | None


def token_context(
    config: GLMConfig,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: KVCache | None,
    dtype: Any,
    prefix: Prefix | None = None,
    rows: jax.Array | None = None,
    view: int | None = None,
) -> tuple[TokenContext, KVCache | None]:
    """Return the context of the tokens, and the cache with its new lengths and old keys.

    The arguments are those of `glm2_jax.forward`, the activations' dtype and the params' prefix;
    the context has B rows of tokens, whatever the rows of the cache.
    """
    if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
    if cache is None:
        where, rows, view = _without_cache(config, tokens, segment_ids, prefix), None, None
    else:
        prefix = None
        if rows is not None:
            count = cache.length.size
            segment_ids = jnp.where((rows < count)[:, None], segment_ids, 0)
            # Different numbers past the end, too: indices stay unique.
            past = count + jnp.arange(len(tokens), dtype=jnp.int32)
            rows = jnp.where(rows < count, rows, past)
        where, cache = _in_cache(config, tokens, segment_ids > 0, cache, rows, view)
    positions = where.positions if positions is None else positions
    rotary, scale = config.block.rotary, None
    tables = (None, None) if rotary == "none" else rope_tables(config, positions, dtype)
    if config.logn_scaling:
        logs = jnp.log(where.index.astype(jnp.float32) + 65.0) / jnp.log(2048.0)
        scale = jnp.maximum(logs, 1.0)[:, :, None, None]
    learned = positions if rotary == "none" else None
    context = TokenContext(
        *tables, where.visible, where.slots, scale, prefix, rows, learned, view=view
    )
    return context, cache


def _without_cache(
    config: GLMConfig, tokens: jax.Array, segments: jax.Array, prefix: Prefix | None
) -> _Where:
    B, T = tokens.shape
    P = 0 if prefix is None else prefix.length
    columns = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    index, places, positions = P + columns, P + columns, columns
    if config.block.bidirectional:
        blanks, start = find_blanks(config, tokens, index, segments)
        positions = _positions(config, blanks, index, start)
        places = _places(index, blanks.context, segments > 0)
    everyones = jnp.ones((B, P), jnp.int32)
    key_segments = jnp.concatenate([everyones, segments], axis=1) if P else segments
    whole = P == 0 and not config.block.bidirectional
    visible = Visibility(places, segments, key_segments, prefix=P, whole=whole)
    return _Where(index, positions, visible, None)


def _in_cache(
    config: GLMConfig,
    tokens: jax.Array,
    real: jax.Array,
    cache: KVCache,
    rows: jax.Array | None,
    view: int | None,
) -> tuple[_Where, KVCache]:
    old, first = cache.length, cache.prefix
    if rows is not None:
        old, first = (x.at[rows].get(mode="fill", fill_value=0) for x in (old, first))
    rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    index = places = old[:, None] + jnp.maximum(rank, 0)
    positions = jnp.maximum(index - first[:, None], 0)
    if cache.blanks is not None:
        # The text of a row is read at once: its first tokens say where its blanks are.
        found, _ = find_blanks(config, tokens, index, real.astype(jnp.int32))
        kept = jax.tree.map(lambda x: x[:, None], cache.blanks.at(rows))
        fresh = (old == first)[:, None]
        blanks = jax.tree.map(lambda new, x: jnp.where(fresh, new, x), found, kept)
        positions = _positions(config, blanks, index, first[:, None])
        places = _places(index, blanks.context, real)
        last = jnp.argmax(jnp.where(real, rank, -1), axis=1)[:, None]
        ends = jax.tree.map(lambda x: jnp.take_along_axis(x, last, axis=1)[:, 0], blanks)
        cache = dataclasses.replace(cache, blanks=cache.blanks.with_rows(ends, rows))
    # Padding goes past the end, each token to a different place: indices stay unique.
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    slots = jnp.where(real, index, cache.size + columns)
    new = old + jnp.sum(real, axis=1, dtype=jnp.int32)
    length = new if rows is None else cache.length.at[rows].set(new, mode="drop")
    numbers = jnp.arange(view or cache.size, dtype=jnp.int32)
    written = (numbers < new[:, None]).astype(jnp.int32)
    visible = Visibility(places, real.astype(jnp.int32), written)
    return _Where(index, positions, visible, slots), dataclasses.replace(cache, length=length)


def _positions(config: GLMConfig, blanks: Blanks, index: jax.Array, start: jax.Array) -> jax.Array:
    return index - start if config.block.rotary == "full" else blanks.positions(index, start)


def _places(index: jax.Array, context: jax.Array, real: jax.Array) -> jax.Array:
    """Return the index up to which each token sees, int32 [B, T]: its own, or its context's end."""
    return jnp.where(real, jnp.maximum(index, context - 1), index)
