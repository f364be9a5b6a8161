"""The numbers of a stored parameter, a few megabytes at a time, checked on the way.

Whole tensors are never copied: what is read is a view of the mapped file, what is computed
(dequantized, cast) has the size of a chunk.
"""

import math
from collections.abc import Iterator

import numpy as np

from convert.files.tensor import StoredTensor
from convert.layouts.names import Match, Part
from convert.loading.boxes import Box, pieces, shape_of, slices, whole
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError
from glm2_jax.quant import NO_SCALE, quantize, unpack_int4
from glm2_jax.schemes import Scheme

CHUNK_ELEMENTS = 4 * 2**20

# The exponent bits of a two-byte float: all ones means infinity or NaN. Comparing bits is several
# times faster than numpy's isfinite on these types.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


class Values:
    """One of our parameters in one layer, as it is stored: any box of it can be read.

    Args:
        match: the tensor that it is, or is a part of.
        part: the parameter.
        start: its first element in the flattened tensor.
        stop: the one after its last.
        config: gives the shapes.
        scheme: how the folder's matrices are quantized.

    Attributes:
        columns: elements of a row.
        scheme: how it is quantized; None where it is not.
    """

    def __init__(
        self,
        match: Match,
        part: Part,
        start: int,
        stop: int,
        config: GLMConfig,
        scheme: Scheme | None = None,
    ):
        self.match, self.scheme = match, None if match.scale is None else scheme
        self.start, self.shape = start, part.shape(config)
        self._rows = len(self.shape) - part.column_axes  # axes
        self.columns = math.prod(self.shape[self._rows :])
        elements = math.prod(match.rule.shape(config))

        def stored(tensor: StoredTensor, shape: tuple[int, ...]) -> np.ndarray:
            array = tensor.read()
            first, last = (count * len(array) // elements for count in (start, stop))
            return array[first:last].reshape(shape)

        if match.scale is None or scheme is None:
            self._stored = stored(match.tensor, self.shape)
        else:
            shapes = scheme.shapes(self.shape, part.column_axes)
            self._stored = stored(match.tensor, shapes[0])
            self._scales = stored(match.scale, shapes[1])

    def chunks(self) -> Iterator[np.ndarray]:
        """All elements in order, as stored or float32, in arrays [n]; finite.

        Raises:
            CheckpointError: NaN or infinity, named.
        """
        columns = whole(self.shape[self._rows :])
        for rows in self.row_pieces():
            yield self.floats((*rows, *columns)).reshape(-1)

    def row_pieces(self) -> Iterator[Box]:
        """All rows in order, in boxes of as many as make a chunk."""
        return row_pieces(whole(self.shape[: self._rows]), self.columns)

    def floats(self, box: Box) -> np.ndarray:
        """A box of the elements, as stored or float32; finite.

        Raises:
            CheckpointError: NaN or infinity, or a scale that is none, named.
        """
        values = block(self._stored, box) if self.scheme is None else self._dequantized(box)
        if not all_finite(values):
            raise self._not_finite(values, box)
        return values

    def quantized(self, rows: Box, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
        """Integers and float32 scales of whole rows, of the shapes that `Scheme.shapes` tells.

        A scale is that of all its columns, so that it is the same whoever needs only some. What is
        stored in that scheme is passed on as it is.

        Raises:
            CheckpointError: as `floats` and `scale`.
        """
        if self.scheme == scheme:
            stored = (self._stored, self._scales)
            values, scales = ((*rows, *whole(array.shape[self._rows :])) for array in stored)
            return self.integers(values), self.scale(scales)
        chunk = self.floats((*rows, *whole(self.shape[self._rows :])))
        pair = quantize(chunk.reshape(-1, self.columns), scheme)
        shapes = scheme.shapes(chunk.shape, chunk.ndim - self._rows)
        return pair[0].reshape(shapes[0]), pair[1].reshape(shapes[1])

    def integers(self, box: Box) -> np.ndarray:
        """A box of what is stored quantized: zeros where the scale is none, else as stored."""
        assert self.scheme is not None
        stored, rows, columns = block(self._stored, box), box[: self._rows], box[self._rows :]
        group = self.scheme.group(self.columns)
        if group is None:
            none = block(self._scales, rows) < NO_SCALE
            none = none.reshape(*none.shape, *(1 for _ in columns))
        else:
            width = group * self.scheme.bits // 8  # of a group in the file
            begin, end = _flat(columns, self._stored.shape[self._rows :])
            first, last = begin // width, -(-end // width)
            none = block(self._scales, (*rows, (first, last))) < NO_SCALE
            if none.any():
                none = np.repeat(none, width, -1)[..., begin - first * width : end - first * width]
                none = none.reshape(stored.shape)
        return np.where(none, np.int8(0), stored) if none.any() else stored

    def scale(self, box: Box) -> np.ndarray:
        """A box of the stored scales, float32; 1 where all that it scales is zero (`integers`).

        The published quantizer writes the scale 0 for a row of zeros. The products are the same,
        and what divides by a scale stays finite.

        Raises:
            CheckpointError: one that is NaN, infinite or negative.
        """
        scales = self._checked_scales(box)
        return np.where(scales < NO_SCALE, np.float32(1), scales)

    def _checked_scales(self, box: Box) -> np.ndarray:
        scales = block(self._scales, box).astype(np.float32)
        _check_scales(self.match, scales)
        return scales

    def _dequantized(self, box: Box) -> np.ndarray:
        assert self.scheme is not None
        bits, group, rows = self.scheme.bits, self.scheme.group(self.columns), box[: self._rows]
        begin, end = _flat(box[self._rows :], self.shape[self._rows :])
        unit = group or 8 // bits  # columns that are unpacked together
        first, last = begin // unit, -(-end // unit)
        matrix = self._stored.reshape(*self.shape[: self._rows], -1)
        packed = block(matrix, (*rows, (first * unit * bits // 8, last * unit * bits // 8)))
        scales = self._checked_scales((*rows, (first, last)) if group else rows)
        integers = unpack_int4(packed) if bits == 4 else packed
        scales = scales if group else scales[..., None]
        floats = integers.astype(np.float32).reshape(*scales.shape, -1) * scales[..., None]
        floats = floats.reshape(integers.shape)[..., begin - first * unit : end - first * unit]
        return floats.reshape(shape_of(box))

    def _not_finite(self, block: np.ndarray, box: Box) -> CheckpointError:
        values, match = block.astype(np.float32), self.match
        found = tuple(np.argwhere(~np.isfinite(values))[0])
        at = [begin + index for (begin, _), index in zip(box, found, strict=True)]
        where = self.start + int(np.ravel_multi_index(at, self.shape))
        layer = "" if match.layer is None else f" (layer {match.layer})"
        return CheckpointError(
            f"{match.name}{layer} holds {values[found]} at element {where}.",
            f"{match.tensor.file} is damaged, or the training that made it went wrong.",
            "Download the file again and compare its sha256 with the published one.",
        )


def row_pieces(rows: Box, columns: int) -> Iterator[Box]:
    """Rows of so many columns in order, in boxes of as many as make a chunk."""
    return pieces(rows, CHUNK_ELEMENTS // columns)


def block(array: np.ndarray, box: Box) -> np.ndarray:
    """A box of a mapped tensor, as a view: the one place where stored numbers are taken."""
    return array[slices(box)]


def _flat(columns: Box, shape: tuple[int, ...]) -> tuple[int, int]:
    """Columns of which only the first axis is cut: the first, and the one after the last."""
    inner = math.prod(shape[1:])
    assert columns[1:] == whole(shape[1:]), "only the first axis of columns is ever cut"
    return columns[0][0] * inner, columns[0][1] * inner


def _check_scales(match: Match, scales: np.ndarray) -> None:
    bad = scales[~(np.isfinite(scales) & (scales >= 0))]
    if len(bad):
        raise CheckpointError(
            f"{match.name}_scale holds {bad[0]}, and {len(bad)} such numbers near it.",
            "A scale must be finite and not negative.",
            "Download the file again and compare its sha256 with the published one.",
        )


def all_finite(values: np.ndarray) -> bool:
    """Whether there is neither NaN nor infinity in [n] floats."""
    mask = _EXPONENTS.get(values.dtype.name)
    if mask is None:
        return bool(np.isfinite(values).all())
    return not bool(((values.view(np.uint16) & mask) == mask).any())


def cast(chunk: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The chunk of the tensor `name` in another type.

    Raises:
        CheckpointError: a number is too large for float16.
    """
    if chunk.dtype == dtype:
        return chunk
    with np.errstate(over="ignore"):
        result = chunk.astype(dtype)
    if dtype == np.float16 and not all_finite(result):
        largest = float(np.abs(chunk.astype(np.float32)).max())
        raise CheckpointError(
            f"{name} holds {largest:g}, which float16 cannot represent.",
            "The largest float16 is 65504; larger numbers would become infinite.",
            "Use --dtype bfloat16 or --dtype float32.",
        )
    return result
