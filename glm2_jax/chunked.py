"""Applies a function along a long axis, block by block."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def map_blocks(
    function: Callable[..., jax.Array], size: int, *arrays: jax.Array, axis: int = 1
) -> jax.Array:
    """Call a function with blocks of arrays, one after another, and concatenate its results.

    Args:
        function: takes a block of every array, returns an array with the same axis.
        size: longest block; arrays no longer than that are passed as they are.
        *arrays: equally long along `axis`. The last block is padded with zeros, whose results are
            dropped.
        axis: the axis that is cut.
    """
    length = arrays[0].shape[axis]
    if length <= size:
        return function(*arrays)
    count = -(-length // size)
    size = -(-length // count)  # even blocks need less padding

    def split(x: jax.Array) -> jax.Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, count * size - length)
        x = jnp.pad(x, pad)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    out = jax.lax.map(lambda blocks: function(*blocks), tuple(split(x) for x in arrays))
    out = jnp.moveaxis(out, 0, axis)
    out = out.reshape(*out.shape[:axis], count * size, *out.shape[axis + 2 :])
    return jax.lax.slice_in_dim(out, 0, length, axis=axis)
