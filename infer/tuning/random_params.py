"""Random parameters of any size, made on the device: no file is read or written.

For measuring: the values mean nothing, but they are finite at any depth and no two rows are alike.
Drawing billions of random numbers takes minutes on a CPU, so each value is a hash of its place,
which costs a few integer operations and no memory beyond the result.
"""

from __future__ import annotations

import functools
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from glm2_jax import GLMConfig
from glm2_jax.quant import QTensor
from glm2_jax.runtime.dtypes import dtype_name
from glm2_jax.schemes import Scheme
from glm2_jax.sharding import params_sharding
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params

_DEVIATION = 0.02  # of every matrix
_NOISE_DEVIATION = {8: 73.9, 4: 4.61}  # of evenly distributed integers of so many bits


def random_params(
    config: GLMConfig,
    dtype: Any,
    *,
    scheme: Scheme | None = None,
    as_list: bool = False,
    device: Any = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Return parameters as `convert.load_checkpoint` would; on a mesh with the same values, of
    which every device makes its part and no more. `dtype` is that of all that is not quantized."""
    precision = Precision(dtype_name(dtype), None if scheme is None else scheme.name)
    shapes, seeds = abstract_params(config, precision, stacked=not as_list), count(1)
    if mesh is None:
        place = SingleDeviceSharding(device or jax.devices()[0])
        places = jax.tree.map(lambda x: place, shapes)
    else:
        places = params_sharding(config, mesh, scheme=scheme, as_list=as_list)

    def make(path: Any, x: Any, place: Any) -> Any:
        seed = next(seeds)
        if not isinstance(x, QTensor) and path[-1].key.endswith("norm"):
            return jnp.ones(x.shape, x.dtype, device=place)
        return random_weight(x, seed, place)

    made = jax.tree_util.tree_map_with_path(
        make, shapes, places, is_leaf=lambda x: isinstance(x, QTensor)
    )
    return jax.block_until_ready(made)


def random_weight(x: Any, seed: int, place: Any) -> Any:
    """Return a weight of these shapes, of an array or a QTensor, on these places."""
    if not isinstance(x, QTensor):
        return _program(x.shape, x.dtype, place)(np.uint32(seed))
    step = _DEVIATION / _NOISE_DEVIATION[x.bits]
    scale = jnp.full(x.scale.shape, step, x.scale.dtype, device=place.scale)
    return QTensor(_program(x.values.shape, None, place.values)(np.uint32(seed)), scale, x.bits)


@functools.lru_cache
def _program(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
    """Return the program that makes a matrix from a seed, each device its part: integers, or of a
    dtype."""

    def floats(seed: jax.Array) -> jax.Array:
        values = _noise(seed, shape).astype(jnp.float32) * (_DEVIATION / _NOISE_DEVIATION[8])
        return values.astype(dtype)

    integers = functools.partial(_noise, shape=shape)
    return jax.jit(integers if dtype is None else floats, out_shardings=place)


def _noise(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """int8, evenly distributed, as are both values where a byte holds two of four bits: the highest
    byte of a hash ("lowbias32") of each place."""
    place, stride = jnp.broadcast_to(seed * jnp.uint32(0x9E3779B9), shape), 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        place += index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    place = (place ^ (place >> 16)) * jnp.uint32(0x7FEB352D)
    place = (place ^ (place >> 15)) * jnp.uint32(0x846CA68B)
    return jax.lax.bitcast_convert_type((place >> 24).astype(jnp.uint8), jnp.int8)
