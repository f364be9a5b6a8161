"""The parameters of a folder in their places on devices, in the layout that was asked for."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from convert.layouts.names import PARTS, Part
from convert.loading.boxes import Box, shape_of, whole
from convert.loading.fill import ArraySpec, Place
from convert.loading.folder import Folder
from convert.loading.values import Values, cast, row_pieces
from glm2_jax.quant import QTensor
from glm2_jax.schemes import Scheme
from glm2_jax.sharding import params_sharding

Progress = Callable[[int, int], None]


def load_params(
    folder: Folder,
    dtype: np.dtype,
    scheme: Scheme | None,
    as_list: bool,
    where: Any,
    progress: Progress,
) -> dict[str, Any]:
    """Fills the parameters in the order of the files, so that disks read forwards.

    Args:
        folder: where from.
        dtype: of everything that is not quantized.
        scheme: of the matrices that it covers; None = they have `dtype`, too.
        as_list: whether the layers are a list, and not stacked.
        where: a `jax.sharding.Mesh`, a `jax.Device`, or None for the default device.
        progress: called with the bytes done and to do, of this process.

    Raises:
        CheckpointError: NaN or infinity, a scale that is none, a number too large for float16.
    """
    params, done = _Params(folder, dtype, scheme, as_list, where), 0
    for match in folder.matches:
        for part, start, stop in match.rule.ranges(folder.config):
            weight = params.open(part, match.layer)
            values = Values(match, part, start, stop, folder.config, folder.scheme)
            for written in weight.fill(values):
                done += written
                progress(done, params.nbytes)
            params.close(part, match.layer)
    return params.tree


class _Plain:
    """A parameter, or the stack of it over all layers, while it is filled.

    Args:
        spec: the array, with the axis of layers if there is one.
        stacked: whether there is one.
        column_axes: how many of its last axes are columns.
    """

    def __init__(self, spec: ArraySpec, stacked: bool, column_axes: int):
        self.place, self.stacked, self.layer = Place(spec), stacked, 0
        boxes = [box[1:] if stacked else box for box in self.place.boxes]
        rows = len(spec.shape) - stacked - column_axes
        self.columns_of: dict[Box, list[Box]] = {}  # rows that are needed -> which of their columns
        for box in boxes:
            self.columns_of.setdefault(box[:rows], []).append(box[rows:])

    def fill(self, values: Values) -> Iterator[int]:
        """Reads what is needed for the current layer; gives the bytes filled each time."""
        dtype = self.place.spec.dtype

        def read(box: Box) -> np.ndarray:
            chunk = values.floats(box)
            return cast(chunk, dtype, values.match.name) if dtype == np.float16 else chunk

        yield from self.copy(read)

    def copy(self, read: Callable[[Box], np.ndarray]) -> Iterator[int]:
        """The same, for numbers that are taken as they are."""
        for rows, columns in self.columns_of.items():
            width = sum(math.prod(shape_of(box)) for box in columns)
            for piece in row_pieces(rows, width):
                for box in columns:
                    yield self.write((*piece, *box), read((*piece, *box)))

    def write(self, box: Box, chunk: np.ndarray) -> int:
        """Puts a box of the current layer; returns the bytes filled."""
        if not self.stacked:
            return self.place.write(box, chunk)
        return self.place.write(((self.layer, self.layer + 1), *box), chunk[None])

    def finish(self) -> jax.Array:
        return self.place.finish()


class _Quantized:
    """The same for a quantized one: integers and scales."""

    def __init__(self, specs: list[ArraySpec], scheme: Scheme, stacked: bool, column_axes: int):
        values, scales = specs
        rows = len(values.shape) - column_axes
        self.scheme = scheme
        self.values = _Plain(values, stacked, column_axes)
        self.scales = _Plain(scales, stacked, len(scales.shape) - rows)

    @property
    def layer(self) -> int:
        return self.values.layer

    @layer.setter
    def layer(self, layer: int) -> None:
        self.values.layer = self.scales.layer = layer

    def fill(self, values: Values) -> Iterator[int]:
        """As above. What is quantized here is read in whole rows: those that are needed."""
        if values.scheme == self.scheme:
            yield from self.values.copy(values.integers)
            yield from self.scales.copy(values.scale)
            return
        for rows in self.values.columns_of | self.scales.columns_of:
            for piece in row_pieces(rows, values.columns):
                written = 0
                blocks = values.quantized(piece, self.scheme)
                for place, block in zip((self.values, self.scales), blocks, strict=True):
                    written += place.write((*piece, *whole(block.shape[len(piece) :])), block)
                yield written

    def finish(self) -> QTensor:
        return QTensor(self.values.finish(), self.scales.finish(), self.scheme.bits)


class _Params:
    """The params tree while it is filled; each array is finished as soon as its last layer is in.

    Attributes:
        tree: what is finished; all of it in the end.
        nbytes: of what this process fills.
    """

    def __init__(
        self, folder: Folder, dtype: np.dtype, scheme: Scheme | None, as_list: bool, where: Any
    ):
        self.config, self.dtype, self.scheme = folder.config, dtype, scheme
        self.as_list, count = as_list, folder.config.num_layers
        self.sharding = _sharding_of(folder, scheme, as_list, where)
        self.tree: dict[str, Any] = {"layers": [{} for _ in range(count)] if as_list else {}}
        self._open: dict[tuple, _Plain | _Quantized] = {}
        self._missing: dict[tuple, int] = {}
        self.nbytes = sum(
            spec.nbytes * (count if as_list and _in_layers(part) else 1)
            for part in PARTS
            for spec in self._specs(part)
        )

    def open(self, part: Part, layer: int | None) -> "_Plain | _Quantized":
        """Where the next elements of a part go."""
        key = self._key(part, layer)
        weight = self._open.get(key)
        if weight is None:
            stacked, axes = self._stacked(part), part.column_axes
            specs = self._specs(part)
            if self.scheme is not None and part.quantized(self.scheme):
                weight = _Quantized(specs, self.scheme, stacked, axes)
            else:
                weight = _Plain(specs[0], stacked, axes)
            layers = self.config.num_layers if stacked else 1
            self._open[key], self._missing[key] = weight, layers
        weight.layer = 0 if self.as_list else layer or 0
        return weight

    def close(self, part: Part, layer: int | None) -> None:
        """One layer of a part is in."""
        key = self._key(part, layer)
        self._missing[key] -= 1
        if self._missing[key]:
            return
        branch = self.tree
        if _in_layers(part):
            branch = branch["layers"][layer] if self.as_list else branch["layers"]
        branch[part.path[-1]] = self._open.pop(key).finish()

    def _key(self, part: Part, layer: int | None) -> tuple:
        return (*part.path, layer) if self.as_list else part.path

    def _stacked(self, part: Part) -> bool:
        return _in_layers(part) and not self.as_list

    def _specs(self, part: Part) -> list[ArraySpec]:
        """The array of a part, or the two of a quantized one."""
        stack = (self.config.num_layers,) if self._stacked(part) else ()
        shape, sharding = stack + part.shape(self.config), self.sharding(part)
        if self.scheme is None or not part.quantized(self.scheme):
            return [ArraySpec(shape, self.dtype, sharding)]
        shapes = self.scheme.shapes(shape, part.column_axes)
        dtypes = (np.dtype(np.int8), np.dtype(np.float32))
        shardings = (sharding, sharding)
        if isinstance(sharding, QTensor):
            shardings = (sharding.values, sharding.scale)
        return [ArraySpec(*spec) for spec in zip(shapes, dtypes, shardings, strict=True)]


def _sharding_of(
    folder: Folder, scheme: Scheme | None, as_list: bool, where: Any
) -> Callable[[Part], Any]:
    """Which sharding, or QTensor of two, the array of a part has; None = the default device's."""
    if not isinstance(where, Mesh):
        single = None if where is None else SingleDeviceSharding(where)
        return lambda part: single
    tree = params_sharding(folder.config, where, scheme=scheme, as_list=as_list)
    layer = tree["layers"][0] if as_list else tree["layers"]
    return lambda part: (layer if _in_layers(part) else tree)[part.path[-1]]


def _in_layers(part: Part) -> bool:
    return part.path[0] == "layers"
