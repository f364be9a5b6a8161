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
    """What every layer needs to know of the tokens besides their activations."""

    cos: jax.Array  # float32 [B, T, H / 4], of the rotary angles
    sin: jax.Array
    visible: Visibility  # the keys that each query sees: of the cache, else of prefix and tokens
    slots: jax.Array | None  # int32 [B, T], each token's cache slot; past the end = not written
    query_scale: jax.Array | None  # float32 [B, T, 1, 1]
    prefix: Prefix | None = None  # to be put before the tokens' keys; a cache holds it already
    rows: jax.Array | None = None  # int32 [B], the tokens' rows of the cache; None = all
    # How many slots of the cache are read, None = all.
    view: int | None = flax.struct.field(pytree_node=False, default=None)


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
) -> tuple[TokenContext, jax.Array | None]:
    """Return the context of the tokens, and the new lengths of the cache (None without a cache).

    The arguments are those of `glm2_jax.forward`, the activations' dtype and the params' prefix;
    the context has B rows of tokens, whatever the rows of the cache.
    """
    B, T = tokens.shape
    if segment_ids is None:
        segment_ids = jnp.ones((B, T), jnp.int32)
    real = segment_ids > 0
    columns = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if cache is None:
        P = 0 if prefix is None else prefix.length
        index, default_positions = P + columns, columns
        slots = length = rows = view = None
        everyones = jnp.ones((B, P), jnp.int32)
        key_segments = jnp.concatenate([everyones, segment_ids], axis=1) if P else segment_ids
        visible = Visibility(index, segment_ids, key_segments, prefix=P)
    else:
        prefix = None
        old, first = cache.length, cache.prefix
        if rows is not None:
            count = old.size
            real &= (rows < count)[:, None]
            # Different numbers past the end, too: indices stay unique.
            rows = jnp.where(rows < count, rows, count + jnp.arange(B, dtype=jnp.int32))
            old, first = (x.at[rows].get(mode="fill", fill_value=0) for x in (old, first))
        rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        index = old[:, None] + jnp.maximum(rank, 0)
        default_positions = jnp.maximum(index - first[:, None], 0)
        # Padding goes past the end, each token to a different place: indices stay unique.
        slots = jnp.where(real, index, cache.size + columns)
        new = old + jnp.sum(real, axis=1, dtype=jnp.int32)
        length = new if rows is None else cache.length.at[rows].set(new, mode="drop")
        numbers = jnp.arange(view or cache.size, dtype=jnp.int32)
        written = (numbers < new[:, None]).astype(jnp.int32)
        visible = Visibility(index, real.astype(jnp.int32), written)
    cos, sin = rope_tables(config, default_positions if positions is None else positions, dtype)
    scale = None
    if config.logn_scaling:
        logs = jnp.log(index.astype(jnp.float32) + 65.0) / jnp.log(2048.0)
        scale = jnp.maximum(logs, 1.0)[:, :, None, None]
    return TokenContext(cos, sin, visible, slots, scale, prefix, rows, view), length
