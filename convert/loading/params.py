"""Fills the parameters of a folder into arrays that exist once, piece by piece.

Measured with jax 0.10.2 and 0.12.0: `jax.device_put` of a 64-byte aligned numpy array is a view
on the CPU (no copy, no extra memory), so there the array is filled in numpy. On an accelerator
pieces are written into the array on the device, whose buffer is donated each time.

Threads fill pieces at the same time: reading waits for the disk, and numpy checks, casts and
quantizes without Python's lock.
"""

import collections
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from convert.layouts.names import column_axes
from convert.loading.folder import Folder
from convert.loading.values import (
    Box,
    Values,
    cast,
    full_box,
    overlap,
    row_pieces,
    shape_of,
    slices,
)
from glm2_jax.parts import Part, parts_of
from glm2_jax.quant import QTensor
from glm2_jax.schemes import Scheme
from glm2_jax.sharding import params_sharding

Progress = Callable[[int, int], None]

THREADS = 4  # each needs a few times the memory of a piece
_ALIGNMENT = 64


def load_params(
    folder: Folder,
    dtype: np.dtype,
    scheme: Scheme | None,
    as_list: bool,
    where: Any,
    progress: Progress,
) -> dict[str, Any]:
    """Fill the parameters in the order of the files, so that disks read forwards.

    `scheme` quantizes what it covers, the rest has `dtype`; `where` is a `jax.sharding.Mesh`, a
    `jax.Device`, or None for the default device; `progress` is called with the bytes done and to
    do, of this process. NaN or infinity, a bad scale, or a number too large for float16 is a
    `CheckpointError`.
    """
    config, done = folder.config, 0
    layers: Any = [{} for _ in range(config.num_layers)] if as_list else {}
    shardings = None
    if isinstance(where, Mesh):
        shardings = params_sharding(config, where, scheme=scheme, as_list=as_list)
    single = None if where is None or shardings else SingleDeviceSharding(where)
    tree: dict[str, Any] = {"layers": layers}

    def branch(tree: Any, part: Part, layer: int | None) -> dict[str, Any]:
        """Return the dictionary of the tree that holds a parameter."""
        tree = tree["layers"] if part.in_layers else tree
        return tree[layer] if part.in_layers and as_list else tree

    for part in parts_of(config):
        stack = (config.num_layers,) if part.in_layers and not as_list else ()
        for layer in range(config.num_layers) if part.in_layers and as_list else (0,):
            sharding = branch(shardings, part, layer)[part.name] if shardings else single
            filled = _Weight(part, part.shape(config), stack, dtype, scheme, sharding)
            branch(tree, part, layer)[part.name] = filled
    total = sum(weight.nbytes for weight in jax.tree.leaves(tree))

    def pieces() -> Iterator[Callable[[], int]]:
        for match in folder.matches:
            for part, start, stop in match.rule.ranges(config):
                values = Values(match, part, start, stop, config, folder.scheme)
                weight = branch(tree, part, match.layer)[part.name]
                yield from weight.pieces(values, match.layer or 0)

    for written in _in_threads(pieces()):
        done += written
        progress(done, total)
    return jax.tree.map(lambda weight: weight.finish(), tree)


def _in_threads(calls: Iterable[Callable[[], int]]) -> Iterator[int]:
    """Yield the results in order, with a few calls at work or waiting at any time."""
    calls = iter(calls)
    with ThreadPoolExecutor(THREADS) as pool:
        begun = collections.deque(map(pool.submit, itertools.islice(calls, 2 * THREADS)))
        while begun:
            yield begun.popleft().result()
            begun.extend(map(pool.submit, itertools.islice(calls, 1)))


class _Weight:
    """A parameter of the shape (*stack, *shape) while it is filled.

    Where `scheme` covers it, a second array holds its scales, and `sharding` is a QTensor of two.
    """

    def __init__(
        self,
        part: Part,
        shape: tuple[int, ...],
        stack: tuple[int, ...],
        dtype: np.dtype,
        scheme: Scheme | None,
        sharding: Any,
    ):
        self.scheme, self.stacked = None, bool(stack)
        if scheme is not None and scheme.covers(part.name):
            self.scheme = scheme.of(part.name)
        self.row_axes = len(shape) - column_axes(part)
        if self.scheme is None:
            self.places = [Place((*stack, *shape), dtype, sharding)]
        else:
            shapes = self.scheme.shapes((*stack, *shape), column_axes(part))
            pair = isinstance(sharding, QTensor)
            shardings = (sharding.values, sharding.scale) if pair else (sharding, sharding)
            dtypes = (np.dtype(np.int8), np.dtype(np.float32))
            self.places = list(map(Place, shapes, dtypes, shardings))
        self.nbytes = sum(place.nbytes for place in self.places)

    def pieces(self, values: Values, layer: int) -> Iterator[Callable[[], int]]:
        """Yield functions that fill all that is needed for a layer, and return the bytes."""
        if self.scheme is None:
            dtype = self.places[0].dtype

            def read(box: Box) -> np.ndarray:
                chunk = values.floats(box)
                return cast(chunk, dtype, values.match.name) if dtype == np.float16 else chunk

            yield from self._copies(self.places[0], layer, read)
        elif values.scheme == self.scheme:
            yield from self._copies(self.places[0], layer, values.integers)
            yield from self._copies(self.places[1], layer, values.scale)
        else:  # a scale is that of complete rows
            boxes = [self._in_layer(box) for place in self.places for box in place.boxes]
            for needed in dict.fromkeys(box[: self.row_axes] for box in boxes):
                for rows in row_pieces(needed, values.columns):
                    yield partial(self._quantize, values, layer, rows, self.scheme)

    def finish(self) -> jax.Array | QTensor:
        """Return the filled arrays."""
        arrays = [place.finish() for place in self.places]
        return arrays[0] if self.scheme is None else QTensor(*arrays, bits=self.scheme.bits)

    def _in_layer(self, box: Box) -> Box:
        return box[1:] if self.stacked else box

    def _copies(
        self, place: "Place", layer: int, read: Callable[[Box], np.ndarray]
    ) -> Iterator[Callable[[], int]]:
        def copy(box: Box) -> int:
            return self._write(place, layer, box, read(box))

        for box in map(self._in_layer, place.boxes):
            columns = box[self.row_axes :]
            for rows in row_pieces(box[: self.row_axes], math.prod(shape_of(columns))):
                yield partial(copy, (*rows, *columns))

    def _quantize(self, values: Values, layer: int, rows: Box, scheme: Scheme) -> int:
        written = 0
        for place, block in zip(self.places, values.quantized(rows, scheme), strict=True):
            box = (*rows, *full_box(block.shape[self.row_axes :]))
            written += self._write(place, layer, box, block)
        return written

    def _write(self, place: "Place", layer: int, box: Box, chunk: np.ndarray) -> int:
        if not self.stacked:
            return place.write(box, chunk)
        return place.write(((layer, layer + 1), *box), chunk[None])


class Place:
    """The boxes of an array that are on this process's devices, each filled once."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Any):
        self.shape, self.dtype, self.sharding = shape, dtype, sharding
        self._parts = {
            box: (HostPlace if _platform(devices[0]) == "cpu" else DevicePlace)(
                shape_of(box), dtype, devices
            )
            for box, devices in local_boxes(shape, sharding).items()
        }
        self.boxes = tuple(self._parts)
        self.nbytes = sum(math.prod(shape_of(box)) for box in self.boxes) * dtype.itemsize

    def write(self, box: Box, values: np.ndarray) -> int:
        """Put what is needed of `values`, of the shape of `box`, cast; return its bytes."""
        written = 0
        for own, part in self._parts.items():
            common = overlap(own, box)
            if common is not None:
                part.write(slices(common, own), values[slices(common, box)])
                written += math.prod(shape_of(common)) * self.dtype.itemsize
        return written

    def finish(self) -> jax.Array:
        """Return the filled array."""
        arrays = [array for part in self._parts.values() for array in part.finish()]
        if self.sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, arrays, dtype=self.dtype
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


def _platform(device: Any) -> str:
    return jax.default_backend() if device is None else device.platform


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
        first, *self.others = devices
        self.array = jnp.zeros(shape, dtype, device=first)
        (self.first,) = self.array.devices()  # a default device may be that of one thread
        self.lock = threading.Lock()

    def write(self, index: tuple[slice, ...], values: np.ndarray) -> None:
        """Put `values` at `index`; the cast happens on the device."""
        piece = jax.device_put(values, self.first)
        with self.lock:
            self.array = _update(self.array, piece, tuple(cut.start for cut in index))

    def finish(self) -> list[jax.Array]:
        """Return the filled box for each of its devices."""
        return [self.array, *(jax.device_put(self.array, other) for other in self.others)]


@functools.partial(jax.jit, donate_argnums=0)
def _update(array: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, piece.astype(array.dtype), start)
