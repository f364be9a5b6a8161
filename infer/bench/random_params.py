"""Random parameters of any size made on the device: no file is read, none is written.

For measuring: the values mean nothing, but they are finite at any depth and no two rows are alike.
Drawing thousands of millions of random numbers takes minutes on a CPU, so each value is a hash of
its place, which costs a few integer operations and no memory beyond the result.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, param_shapes
from glm2_jax.quant import QTensor
from glm2_jax.schemes import COLUMN_AXES, Scheme

_DEVIATION = 0.02  # of every matrix
_NOISE_DEVIATION = {8: 73.9, 4: 4.61}  # of evenly distributed integers of so many bits


def random_params(
    config: GLMConfig,
    dtype: Any,
    *,
    scheme: Scheme | None = None,
    as_list: bool = False,
    device: Any = None,
) -> dict[str, Any]:
    """Parameters as `convert.load_checkpoint` would give them.

    Args:
        config: the architecture.
        dtype: of everything that is not quantised.
        scheme: of the layers' matrices, made as integers and scales at once; None = they have
            `dtype`, too.
        as_list: whether the layers are a list, and not stacked.
        device: a `jax.Device`; None = the default one.
    """
    shapes, seeds = param_shapes(config), iter(range(1, 2**31))

    def array(name: str, shape: tuple[int, ...]) -> Any:
        seed = np.uint32(next(seeds))
        if name.endswith("norm"):
            return jnp.ones(shape, dtype)
        if scheme is None or name not in COLUMN_AXES:
            return _floats(seed, shape, np.dtype(dtype))
        values, scales = scheme.shapes(shape, COLUMN_AXES[name])
        scale = jnp.full(scales, _DEVIATION / _NOISE_DEVIATION[scheme.bits], jnp.float32)
        return QTensor(_noise(seed, values), scale, scheme.bits)

    with jax.default_device(device):
        params = {name: array(name, shapes[name]) for name in ("embed", "final_norm", "head")}
        if as_list:
            one = {name: shape[1:] for name, shape in shapes["layers"].items()}
            layers = [
                {name: array(name, shape) for name, shape in one.items()}
                for _ in range(config.num_layers)
            ]
        else:
            layers = {name: array(name, shape) for name, shape in shapes["layers"].items()}
        return jax.block_until_ready(params | {"layers": layers})


@functools.partial(jax.jit, static_argnums=(1, 2))
def _floats(seed: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    values = _noise(seed, shape).astype(jnp.float32) * (_DEVIATION / _NOISE_DEVIATION[8])
    return values.astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _noise(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """int8, evenly distributed: the highest byte of a hash ("lowbias32") of each place.

    Both values are, where a byte holds two of four bits."""
    place, stride = jnp.broadcast_to(seed * jnp.uint32(0x9E3779B9), shape), 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        place += index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    place = (place ^ (place >> 16)) * jnp.uint32(0x7FEB352D)
    place = (place ^ (place >> 15)) * jnp.uint32(0x846CA68B)
    return jax.lax.bitcast_convert_type((place >> 24).astype(jnp.uint8), jnp.int8)
