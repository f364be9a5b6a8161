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
    out = jax.lax.map(lambda blocks: function(*blocks), split_blocks(size, *arrays))
    return join_blocks(out, length)


def split_blocks(size: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return [B, T, ...] arrays as [blocks, B, at most size, ...], padded with zeros at the end."""
    length = arrays[0].shape[1]
    count = -(-length // size)
    size = -(-length // count)  # even blocks need less padding

    def split(x: jax.Array) -> jax.Array:
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, count * size - length)
        x = jnp.pad(x, pad)
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    return tuple(split(x) for x in arrays)


def join_blocks(blocks: jax.Array, length: int) -> jax.Array:
    """Return [blocks, B, size, ...] as [B, T, ...] with T = `length`, without the padding."""
    out = jnp.moveaxis(blocks, 0, 1)
    out = out.reshape(out.shape[0], -1, *out.shape[3:])
    return jax.lax.slice_in_dim(out, 0, length, axis=1)
