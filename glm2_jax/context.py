"""What the layers need to know of the tokens: positions, visibility, slots of the cache.

Axis letters as in `glm2_jax.model`.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from glm2_jax.attention import Visibility
from glm2_jax.cache import KVCache
from glm2_jax.config import GLMConfig
from glm2_jax.rope import rope_tables


@flax.struct.dataclass
class TokenContext:
    """What every layer needs to know of the tokens, beside their activations.

    Attributes:
        cos: float32 [B, T, H / 4] of the rotary angles; sin likewise.
        sin: see cos.
        visible: which keys each query may look at; S = T without a cache.
        slots: int32 [B, T], the cache's slot each token is written to; past the end: dropped. None
            without a cache.
        query_scale: float32 [B, T, 1, 1], or None where queries are not scaled.
    """

    cos: jax.Array
    sin: jax.Array
    visible: Visibility
    slots: jax.Array | None
    query_scale: jax.Array | None


def token_context(
    config: GLMConfig,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: KVCache | None,
    dtype: Any,
) -> tuple[TokenContext, jax.Array | None]:
    """The tokens' context, and the cache's new lengths (None without a cache).

    Args:
        tokens, positions, segment_ids, cache: as in `glm2_jax.forward`.
        dtype: of the activations.
    """
    B, T = tokens.shape
    if segment_ids is None:
        segment_ids = jnp.ones((B, T), jnp.int32)
    real = segment_ids > 0
    columns = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if cache is None:
        index, default_positions = columns, columns
        slots = length = None
        visible = Visibility(index, segment_ids, segment_ids)
    else:
        rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        index = cache.length[:, None] + jnp.maximum(rank, 0)
        default_positions = jnp.maximum(index - cache.prefix[:, None], 0)
        # Padding goes past the end, each to a place of its own: indices stay unique.
        slots = jnp.where(real, index, cache.size + columns)
        length = cache.length + jnp.sum(real, axis=1, dtype=jnp.int32)
        numbers = jnp.arange(cache.size, dtype=jnp.int32)
        written = (numbers < length[:, None]).astype(jnp.int32)
        visible = Visibility(index, jnp.ones_like(index), written)
    cos, sin = rope_tables(config, default_positions if positions is None else positions, dtype)
    scale = _logn_scale(index) if config.logn_scaling else None
    return TokenContext(cos, sin, visible, slots, scale), length


def _logn_scale(index: jax.Array) -> jax.Array:
    """max(1, log(64 + p + 1) / log(2048)) of each query's place on the key axis; [B, T, 1, 1]."""
    scale = jnp.log(index.astype(jnp.float32) + 65.0) / jnp.log(2048.0)
    return jnp.maximum(scale, 1.0)[:, :, None, None]
