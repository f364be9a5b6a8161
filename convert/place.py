"""Where parameters end up: stacked arrays that are filled piece by piece and exist once.

Measured with jax 0.10.2 and 0.12.0: `jax.device_put` of a 64-byte aligned numpy array is a view
on the CPU (no copy, no extra memory), so there the array is filled in numpy. On an accelerator
pieces are written into the array on the device, whose buffer is donated each time.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised numpy array whose memory XLA:CPU can use as it is."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class HostPlace:
    """A stacked array in host memory: [layers, ...], filled as [layers, elements]."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, layers: int, device: Any):
        self.array, self.device = aligned_empty(shape, dtype), device
        self.flat = self.array.reshape(layers, -1)

    def write(self, layer: int, start: int, values: np.ndarray) -> None:
        """Puts `values` [n] at element `start` of a layer, cast."""
        np.copyto(self.flat[layer, start : start + len(values)], values, casting="unsafe")

    def finish(self) -> jax.Array:
        """The filled array for jax, without a copy."""
        return jax.device_put(self.array, self.device, may_alias=True)


class DevicePlace:
    """A stacked array on an accelerator, filled the same way."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, layers: int, device: Any):
        self.layers, self.device = layers, device
        self.array = jnp.zeros(shape, dtype, device=device)

    def write(self, layer: int, start: int, values: np.ndarray) -> None:
        """Puts `values` [n] at element `start` of a layer; the cast happens on the device."""
        piece = jax.device_put(values, self.device)
        self.array = _update(self.array, piece, layer, start, self.layers)

    def finish(self) -> jax.Array:
        """The filled array."""
        return self.array


@functools.partial(jax.jit, static_argnums=4, donate_argnums=0)
def _update(array: jax.Array, piece: jax.Array, layer: int, start: int, layers: int) -> jax.Array:
    flat = array.reshape(layers, -1)
    piece = piece.astype(array.dtype)[None]
    return jax.lax.dynamic_update_slice(flat, piece, (layer, start)).reshape(array.shape)


def new_place(
    shape: tuple[int, ...], dtype: np.dtype, layers: int, device: Any
) -> HostPlace | DevicePlace:
    """A place on `device` (a `jax.Device`, or None for the default one)."""
    platform = jax.default_backend() if device is None else device.platform
    return (HostPlace if platform == "cpu" else DevicePlace)(shape, dtype, layers, device)
