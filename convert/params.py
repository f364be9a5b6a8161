"""The parameters of a folder in their places on a device, in the layout that was asked for."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from convert.folder import Folder
from convert.names import PARTS, Part
from convert.place import DevicePlace, HostPlace, new_place
from convert.values import Values, cast
from glm2_jax.quant import QTensor, Scheme

Progress = Callable[[int, int], None]


def load_params(
    folder: Folder,
    dtype: np.dtype,
    scheme: Scheme | None,
    as_list: bool,
    device: Any,
    progress: Progress,
) -> dict[str, Any]:
    """Fills the parameters in the order of the files, so that disks read forwards.

    Args:
        folder: where from.
        dtype: of everything that is not quantised.
        scheme: of the matrices that it covers; None = they have `dtype`, too.
        as_list: whether the layers are a list, and not stacked.
        device: a `jax.Device`, or None for the default one.
        progress: called with the bytes done and to do.

    Raises:
        CheckpointError: NaN or infinity, a scale that is none, a number too large for float16.
    """
    params, done = _Params(folder, dtype, scheme, as_list, device), 0
    for match in folder.matches:
        values = Values(match, folder.config, folder.scheme)
        for part, start, stop in match.rule.ranges(folder.config):
            weight = params.open(part, match.layer)
            if isinstance(weight, _Quantised):
                for row, integers, scales in values.quantised(start, stop, weight.scheme):
                    done += weight.write(row, integers, scales)
                    progress(done, params.nbytes)
            else:
                for begin, chunk in values.chunks(start, stop):
                    if dtype == np.float16:
                        chunk = cast(chunk, dtype, match.name)
                    done += weight.write(begin - start, chunk)
                    progress(done, params.nbytes)
            params.close(part, match.layer)
    return params.tree


class _Plain:
    """A parameter, or the stack of it over all layers, while it is filled."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, layers: int, device: Any):
        self.place: HostPlace | DevicePlace = new_place(shape, dtype, layers, device)
        self.itemsize, self.layer = dtype.itemsize, 0

    def write(self, start: int, chunk: np.ndarray) -> int:
        """Puts elements [n] at `start` of the current layer; returns their bytes there."""
        self.place.write(self.layer, start, chunk)
        return chunk.size * self.itemsize

    def finish(self) -> Any:
        return self.place.finish()


class _Quantised:
    """The same for a quantised one: integers and scales."""

    def __init__(self, scheme: Scheme, shape: tuple[int, ...], axes: int, layers: int, device: Any):
        values, scales = scheme.shapes(shape, axes)
        self.scheme, self.layer = scheme, 0
        self.values = _Plain(values, np.dtype(np.int8), layers, device)
        self.scales = _Plain(scales, np.dtype(np.float32), layers, device)

    def write(self, row: int, integers: np.ndarray, scales: np.ndarray) -> int:
        """Puts whole rows at `row` of the current layer; returns their bytes there."""
        total = 0
        for place, block in ((self.values, integers), (self.scales, scales)):
            place.layer = self.layer
            total += place.write(row * block.shape[1], block.reshape(-1))
        return total

    def finish(self) -> QTensor:
        return QTensor(self.values.finish(), self.scales.finish(), self.scheme.bits)


class _Params:
    """The params tree while it is filled; each array is finished as soon as its last layer is in.

    Attributes:
        tree: what is finished; all of it in the end.
        nbytes: of the whole tree.
    """

    def __init__(
        self, folder: Folder, dtype: np.dtype, scheme: Scheme | None, as_list: bool, device: Any
    ):
        self.config, self.dtype, self.scheme, self.device = folder.config, dtype, scheme, device
        self.as_list, count = as_list, folder.config.num_layers
        self.tree: dict[str, Any] = {"layers": [{} for _ in range(count)] if as_list else {}}
        self._open: dict[tuple, _Plain | _Quantised] = {}
        self._missing: dict[tuple, int] = {}
        self.nbytes = sum(
            self._part_bytes(part) * (count if _in_layers(part) else 1) for part in PARTS
        )

    def open(self, part: Part, layer: int | None) -> "_Plain | _Quantised":
        """Where the next elements of a part go."""
        key = self._key(part, layer)
        weight = self._open.get(key)
        if weight is None:
            stacked = _in_layers(part) and not self.as_list
            layers = self.config.num_layers if stacked else 1
            shape = ((layers,) if stacked else ()) + part.shape(self.config)
            if self.scheme is not None and part.quantised(self.scheme):
                weight = _Quantised(self.scheme, shape, part.column_axes, layers, self.device)
            else:
                weight = _Plain(shape, self.dtype, layers, self.device)
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

    def _part_bytes(self, part: Part) -> int:
        shape = part.shape(self.config)
        if self.scheme is None or not part.quantised(self.scheme):
            return math.prod(shape) * self.dtype.itemsize
        values, scales = self.scheme.shapes(shape, part.column_axes)
        return math.prod(values) + 4 * math.prod(scales)


def _in_layers(part: Part) -> bool:
    return part.path[0] == "layers"
