"""Random parameters of any size, made on the device: no file is read or written.

For measuring: the values mean nothing, but they are finite at any depth and no two rows are alike.
Drawing billions of random numbers takes minutes on a CPU, so each value is a hash of its place,
which costs a few integer operations and no memory beyond the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm2_jax import GLMConfig, param_shapes
from glm2_jax.quant import QTensor
from glm2_jax.schemes import COLUMN_AXES, Scheme
from glm2_jax.sharding import params_sharding

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
    shapes, seeds = param_shapes(config), iter(range(1, 2**31))
    places: Any = {}
    if mesh is not None:
        places = params_sharding(config, mesh, scheme=scheme, as_list=as_list)

    def array(name: str, shape: tuple[int, ...], where: Any) -> Any:
        seed, place = np.uint32(next(seeds)), where.get(name)
        if name.endswith("norm"):
            return jnp.ones(shape, dtype, device=place)
        if scheme is None or name not in COLUMN_AXES:
            return _program(_floats, place, shape, np.dtype(dtype))(seed)
        value_place, scale_place = (None, None) if place is None else (place.values, place.scale)
        values, scales = scheme.shapes(shape, COLUMN_AXES[name])
        step = _DEVIATION / _NOISE_DEVIATION[scheme.bits]
        scale = jnp.full(scales, step, jnp.float32, device=scale_place)
        return QTensor(_program(_noise, value_place, values)(seed), scale, scheme.bits)

    with jax.default_device(device):
        names = ("embed", "final_norm", "head")
        params = {name: array(name, shapes[name], places) for name in names}
        if as_list:
            one = {name: shape[1:] for name, shape in shapes["layers"].items()}
            layers = [
                {name: array(name, shape, where) for name, shape in one.items()}
                for where in places.get("layers", [{}] * config.num_layers)
            ]
        else:
            where = places.get("layers", {})
            layers = {name: array(name, shape, where) for name, shape in shapes["layers"].items()}
        return jax.block_until_ready(params | {"layers": layers})


@functools.lru_cache
def _program(function: Callable, place: Any, *sizes: Any) -> Callable[..., jax.Array]:
    """Compile `function(seed, *sizes)`; each device makes its part of the result."""
    options = {} if place is None else {"out_shardings": place}
    return jax.jit(lambda seed: function(seed, *sizes), **options)


def _floats(seed: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    values = _noise(seed, shape).astype(jnp.float32) * (_DEVIATION / _NOISE_DEVIATION[8])
    return values.astype(dtype)


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
