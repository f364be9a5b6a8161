"""Arrays that are filled piece by piece and exist once.

Measured with jax 0.10.2 and 0.12.0: `jax.device_put` of a 64-byte aligned numpy array is a view
on the CPU (no copy, no extra memory), so there the array is filled in numpy. On an accelerator
pieces are written into the array on the device, whose buffer is donated each time.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.loading.boxes import Box, full_box, overlap, shape_of, slices

_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """The shape and dtype of an array, and its sharding, None for the default device."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Any

    @property
    def nbytes(self) -> int:
        """Bytes of what this process fills."""
        boxes = local_boxes(self.shape, self.sharding)
        return sum(math.prod(shape_of(box)) for box in boxes) * self.dtype.itemsize


class Place:
    """The boxes of an array that are on this process's devices, each filled once.

    Attributes:
        spec: what the array is.
        boxes: which of its boxes this process fills.
    """

    def __init__(self, spec: ArraySpec):
        self.spec = spec
        self._parts = {
            box: _new_part(shape_of(box), spec.dtype, devices)
            for box, devices in local_boxes(spec.shape, spec.sharding).items()
        }
        self.boxes = tuple(self._parts)

    def write(self, box: Box, values: np.ndarray) -> int:
        """Put what is needed of `values`, of the shape of `box`, cast; return its bytes."""
        written = 0
        for own, part in self._parts.items():
            common = overlap(own, box)
            if common is not None:
                part.write(slices(common, own), values[slices(common, box)])
                written += math.prod(shape_of(common)) * self.spec.dtype.itemsize
        return written

    def finish(self) -> jax.Array:
        """Return the filled array."""
        arrays = [array for part in self._parts.values() for array in part.finish()]
        if self.spec.sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(
            self.spec.shape, self.spec.sharding, arrays, dtype=self.spec.dtype
        )


def local_boxes(shape: tuple[int, ...], sharding: Any) -> dict[Box, list[Any]]:
    """Return the boxes of an array that this process holds, each with its devices."""
    if sharding is None:
        return {full_box(shape): [None]}
    boxes: dict[Box, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        box = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
        boxes.setdefault(box, []).append(device)
    return boxes


class HostPlace:
    """A box in host memory, which is the memory of CPU devices."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: list[Any]):
        size = math.prod(shape) * dtype.itemsize
        raw = np.empty(size + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT  # XLA:CPU can use aligned memory as it is
        self.array = raw[start : start + size].view(dtype).reshape(shape)
        self.devices = devices

    def write(self, index: tuple[slice, ...], values: np.ndarray) -> None:
        """Put `values` at `index`, cast."""
        np.copyto(self.array[index], values, casting="unsafe")

    def finish(self) -> list[jax.Array]:
        """Return the filled box for each of its devices, without a copy."""
        return [jax.device_put(self.array, device, may_alias=True) for device in self.devices]


class DevicePlace:
    """A box on an accelerator, filled the same way; a copy for the others that hold the same."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: list[Any]):
        self.first, *self.others = devices
        self.array = jnp.zeros(shape, dtype, device=self.first)

    def write(self, index: tuple[slice, ...], values: np.ndarray) -> None:
        """Put `values` at `index`; the cast happens on the device."""
        piece = jax.device_put(values, self.first)
        self.array = _update(self.array, piece, tuple(cut.start for cut in index))

    def finish(self) -> list[jax.Array]:
        """Return the filled box for each of its devices."""
        return [self.array, *(jax.device_put(self.array, other) for other in self.others)]


@functools.partial(jax.jit, donate_argnums=0)
def _update(array: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, piece.astype(array.dtype), start)


def _new_part(
    shape: tuple[int, ...], dtype: np.dtype, devices: list[Any]
) -> HostPlace | DevicePlace:
    platform = jax.default_backend() if devices[0] is None else devices[0].platform
    return (HostPlace if platform == "cpu" else DevicePlace)(shape, dtype, devices)
