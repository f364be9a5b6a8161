"""Applies a function along a long axis, block by block."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def map_blocks(function: Callable[..., jax.Array], size: int, *arrays: jax.Array) -> jax.Array:
    """Call a function with blocks of [B, T, ...] arrays along T, and concatenate its results.

    Blocks are at most `size` long and computed one after another. The last one is padded with
    zeros, whose results are dropped.
    """
    length = arrays[0].shape[1]
    if length <= size:
        return function(*arrays)
    count = -(-length // size)
    size = -(-length // count)  # even blocks need less padding

    def split(x: jax.Array) -> jax.Array:
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, count * size - length)
        x = jnp.pad(x, pad)
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda blocks: function(*blocks), tuple(split(x) for x in arrays))
    out = jnp.moveaxis(out, 0, 1)
    out = out.reshape(out.shape[0], count * size, *out.shape[3:])
    return jax.lax.slice_in_dim(out, 0, length, axis=1)
