"""The attention of a layer to its tokens and to those before them, through the cache if any."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from glm2_jax.attention import attend, finite_values
from glm2_jax.cache import Noted, read_layer, write_layer, write_notes
from glm2_jax.context import TokenContext
from glm2_jax.ideas import Idea, Seen, check
from glm2_jax.prefix import of_layer

Dropout = Callable[[jax.Array], jax.Array]


def attend_cached(
    idea: Idea,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    caches: tuple[Any, Any],
    layer: Any,
    context: TokenContext,
    dropout: Dropout | None,
    prefix_key: jax.Array | None,
) -> tuple[jax.Array, Any, Any]:
    """Return what the tokens attend to, [B, T, N, H], and the keys and values of all layers.

    q is [B, T, N, H], k and v are [B, T, K, H], all rotated; `caches` are keys and values
    [L, B, K, S, H], or None. `dropout` is that of probabilities, `prefix_key` drops elements of a
    prefix.
    """
    k_cache, v_cache = caches
    keys: Any
    values: Any
    keys, values = finite_values(k, v, context.visible.segments > 0)
    if context.slots is not None:
        rows, view = context.rows, context.view
        with jax.named_scope("cache_update"):
            k_cache = write_layer(k_cache, keys, layer, context.slots, rows)
            v_cache = write_layer(v_cache, values, layer, context.slots, rows)
        keys, values = (read_layer(cache, layer, rows, view) for cache in (k_cache, v_cache))
    else:
        if context.prefix is not None:
            first = of_layer(context.prefix, layer, len(k), k.dtype, prefix_key)
            keys, values = (
                jnp.concatenate(pair, axis=1) for pair in zip(first, (keys, values), strict=True)
            )
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    if idea.attention is None:
        return attend(q, keys, values, context.visible, dropout), k_cache, v_cache
    notes = {name: jnp.zeros(keys.shape[:3], jnp.float32) for name in idea.notes}
    if isinstance(keys, Noted):
        keys, notes = keys.stored, keys.notes
    seen = Seen(q, keys, values, context.visible, layer, notes)
    out = idea.attention(partial(_usual, dropout), seen)
    out = check(idea.attention, out, (q, notes) if idea.notes else q)
    out, notes = out if idea.notes else (out, notes)
    if isinstance(k_cache, Noted):
        k_cache = write_notes(k_cache, notes, layer, context.rows)
    return out, k_cache, v_cache


def _usual(dropout: Dropout | None, seen: Seen) -> jax.Array:
    return attend(seen.q, seen.k, seen.v, seen.visible, dropout)
