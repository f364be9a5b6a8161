"""Fills the parameters of a folder into arrays on devices, in the layout that was asked for."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from convert.layouts.names import PARTS, Part
from convert.loading.boxes import Box, full_box, shape_of
from convert.loading.fill import ArraySpec, Place
from convert.loading.folder import Folder
from convert.loading.values import Values, cast, row_pieces
from glm2_jax.config import GLMConfig
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
    """Fill the parameters in the order of the files, so that disks read forwards.

    Args:
        folder: where from.
        dtype: of everything that is not quantized.
        scheme: of the matrices that it covers; None = they have `dtype`, too.
        as_list: whether the layers are a list, and not stacked.
        where: a `jax.sharding.Mesh`, a `jax.Device`, or None for the default device.
        progress: called with the bytes done and to do, of this process.

    Raises:
        CheckpointError: NaN or infinity, a bad scale, a number too large for float16.
    """
    config, done = folder.config, 0
    sharding_of = _shardings(config, scheme, as_list, where)
    weights: dict[tuple[Part, int | None], _Weight] = {}
    for part in PARTS:
        for layer in range(config.num_layers) if as_list and part.in_layers else (None,):
            stacked = part.in_layers and not as_list
            weights[part, layer] = _Weight(
                part, config, dtype, scheme, sharding_of(part), config.num_layers * stacked
            )
    total = sum(weight.nbytes for weight in weights.values())
    for match in folder.matches:
        for part, start, stop in match.rule.ranges(config):
            weight = weights[part, match.layer if as_list else None]
            values = Values(match, part, start, stop, config, folder.scheme)
            for written in weight.fill(values, match.layer or 0):
                done += written
                progress(done, total)
    tree: dict[str, Any] = {"layers": [{} for _ in range(config.num_layers)] if as_list else {}}
    for part, layer in list(weights):
        branch: Any = tree["layers"] if part.in_layers else tree
        branch = branch if layer is None else branch[layer]
        branch[part.path[-1]] = weights.pop((part, layer)).finish()
    return tree


def _shardings(
    config: GLMConfig, scheme: Scheme | None, as_list: bool, where: Any
) -> Callable[[Part], Any]:
    """Return a function from a part to its sharding, of a quantized one a QTensor of two."""
    if not isinstance(where, Mesh):
        single = None if where is None else SingleDeviceSharding(where)
        return lambda part: single
    tree = params_sharding(config, where, scheme=scheme, as_list=as_list)
    layer = tree["layers"][0] if as_list else tree["layers"]
    return lambda part: (layer if part.in_layers else tree)[part.path[-1]]


class _Weight:
    """A parameter, or the stack of it over all layers, while it is filled.

    Args:
        part: the parameter.
        config: gives the shapes.
        dtype: its type where it is not quantized.
        scheme: how what it covers is quantized: a second array holds the scales.
        sharding: a sharding, a QTensor of two, or None for the default device.
        layers: length of the leading axis of layers; 0 = there is none.
    """

    def __init__(
        self,
        part: Part,
        config: GLMConfig,
        dtype: np.dtype,
        scheme: Scheme | None,
        sharding: Any,
        layers: int,
    ):
        shape = part.shape(config)
        self.scheme, self.stacked = scheme if part.quantized(scheme) else None, layers > 0
        self.row_axes, shape = len(shape) - part.column_axes, (layers,) * (layers > 0) + shape
        specs = [ArraySpec(shape, dtype, sharding)]
        if self.scheme is not None:
            shapes = self.scheme.shapes(shape, part.column_axes)
            pair = isinstance(sharding, QTensor)
            shardings = (sharding.values, sharding.scale) if pair else (sharding, sharding)
            dtypes = (np.dtype(np.int8), np.dtype(np.float32))
            specs = [ArraySpec(*spec) for spec in zip(shapes, dtypes, shardings, strict=True)]
        self.nbytes = sum(spec.nbytes for spec in specs)
        self.places = [Place(spec) for spec in specs]

    def fill(self, values: Values, layer: int) -> Iterator[int]:
        """Read what is needed for a layer; yields the bytes filled each time."""
        if self.scheme is None:
            dtype = self.places[0].spec.dtype

            def read(box: Box) -> np.ndarray:
                chunk = values.floats(box)
                return cast(chunk, dtype, values.match.name) if dtype == np.float16 else chunk

            yield from self._copy(self.places[0], layer, read)
        elif values.scheme == self.scheme:
            yield from self._copy(self.places[0], layer, values.integers)
            yield from self._copy(self.places[1], layer, values.scale)
        else:  # a scale is that of complete rows
            needed = self._columns_of(self.places[0]) | self._columns_of(self.places[1])
            for rows in needed:
                for piece in row_pieces(rows, values.columns):
                    blocks = values.quantized(piece, self.scheme)
                    yield sum(
                        self._write(place, layer, (*piece, *full_box(x.shape[len(piece) :])), x)
                        for place, x in zip(self.places, blocks, strict=True)
                    )

    def finish(self) -> jax.Array | QTensor:
        """Return the filled arrays."""
        values, *scales = [place.finish() for place in self.places]
        return values if self.scheme is None else QTensor(values, scales[0], self.scheme.bits)

    def _columns_of(self, place: Place) -> dict[Box, list[Box]]:
        """Return the rows of one layer that are needed, and which of their columns."""
        result: dict[Box, list[Box]] = {}
        for box in place.boxes:
            box = box[1:] if self.stacked else box
            result.setdefault(box[: self.row_axes], []).append(box[self.row_axes :])
        return result

    def _copy(self, place: Place, layer: int, read: Callable[[Box], np.ndarray]) -> Iterator[int]:
        for rows, columns in self._columns_of(place).items():
            width = sum(math.prod(shape_of(box)) for box in columns)
            for piece in row_pieces(rows, width):
                for box in columns:
                    yield self._write(place, layer, (*piece, *box), read((*piece, *box)))

    def _write(self, place: Place, layer: int, box: Box, chunk: np.ndarray) -> int:
        if not self.stacked:
            return place.write(box, chunk)
        return place.write(((layer, layer + 1), *box), chunk[None])
