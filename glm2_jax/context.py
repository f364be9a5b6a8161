"""What the layers need to know of the tokens: positions, visibility, slots of the cache."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from glm2_jax.attention import Visibility
from glm2_jax.cache import KVCache
from glm2_jax.config import GLMConfig
from glm2_jax.prefix import Prefix
from glm2_jax.rope import rope_tables


@flax.struct.dataclass
class TokenContext:
    """What every layer needs to know of the tokens besides their activations.

    Attributes:
        cos, sin: float32 [B, T, H / 4], of the rotary angles.
        visible: which keys each query sees: of the cache, or without one of prefix and tokens.
        slots: int32 [B, T], the cache slot of each token; past the end = not written. None without
            a cache.
        query_scale: float32 [B, T, 1, 1], or None if queries are not scaled.
        prefix: keys and values that each layer puts before those of the tokens; None with a cache,
            which holds them.
    """

    cos: jax.Array
    sin: jax.Array
    visible: Visibility
    slots: jax.Array | None
    query_scale: jax.Array | None
    prefix: Prefix | None = None


def token_context(
    config: GLMConfig,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: KVCache | None,
    dtype: Any,
    prefix: Prefix | None = None,
) -> tuple[TokenContext, jax.Array | None]:
    """Return the context of the tokens, and the new lengths of the cache (None without a cache).

    Args:
        config, tokens, positions, segment_ids, cache: as in `glm2_jax.forward`.
        dtype: of the activations.
        prefix: of the params; ignored with a cache.
    """
    B, T = tokens.shape
    if segment_ids is None:
        segment_ids = jnp.ones((B, T), jnp.int32)
    real = segment_ids > 0
    columns = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if cache is None:
        P = 0 if prefix is None else prefix.length
        index, default_positions = P + columns, columns
        slots = length = None
        everyones = jnp.ones((B, P), jnp.int32)
        key_segments = jnp.concatenate([everyones, segment_ids], axis=1) if P else segment_ids
        visible = Visibility(index, segment_ids, key_segments, prefix=P)
    else:
        prefix = None
        rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        index = cache.length[:, None] + jnp.maximum(rank, 0)
        default_positions = jnp.maximum(index - cache.prefix[:, None], 0)
        # Padding goes past the end, each token to a different place: indices stay unique.
        slots = jnp.where(real, index, cache.size + columns)
        length = cache.length + jnp.sum(real, axis=1, dtype=jnp.int32)
        numbers = jnp.arange(cache.size, dtype=jnp.int32)
        written = (numbers < length[:, None]).astype(jnp.int32)
        visible = Visibility(index, jnp.ones_like(index), written)
    cos, sin = rope_tables(config, default_positions if positions is None else positions, dtype)
    scale = _logn_scale(index) if config.logn_scaling else None
    return TokenContext(cos, sin, visible, slots, scale, prefix), length


def _logn_scale(index: jax.Array) -> jax.Array:
    """Return max(1, log(64 + p + 1) / log(2048)) of each query's place p; [B, T, 1, 1]."""
    scale = jnp.log(index.astype(jnp.float32) + 65.0) / jnp.log(2048.0)
    return jnp.maximum(scale, 1.0)[:, :, None, None]
