"""Reads the numbers of a stored parameter a few megabytes at a time, and checks them.

Complete tensors are never copied: what is read is a view of the mapped file, what is computed
(dequantized, cast) has the size of a chunk. The exception are matrices that another program packed:
one of them is unpacked at a time.
"""

import math
from collections.abc import Iterator

import numpy as np

from convert.files.tensor import StoredTensor
from convert.layouts.names import Match, column_axes
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError
from glm2_jax.parts import Part
from glm2_jax.quant import NO_SCALE, quantize, unpack_int4
from glm2_jax.schemes import Scheme

# A part of an array: (first index, the one after the last) along each axis. A mesh cuts every array
# into equal boxes, of which a process holds some; what is read and written are boxes, too.
Box = tuple[tuple[int, int], ...]

CHUNK_ELEMENTS = 2**20
_DOWNLOAD_AGAIN = "Download the file again and compare its sha256 with the published one."

# The exponent bits of a two-byte float: all ones means infinity or NaN. Comparing bits is several
# times faster than numpy's isfinite on these types.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


class Values:
    """One of our parameters in one layer, as it is stored: any box of it can be read.

    Boxes that cannot be read, NaN, infinity and bad scales are a `CheckpointError`.

    It is the elements `start` to `stop` of the tensor of `match`, flattened, its rows in our order;
    where they are stored in another one, they are copied. `scheme` is how the
    folder's matrices are quantized, as an attribute None where this one is not.
    """

    def __init__(
        self,
        match: Match,
        part: Part,
        start: int,
        stop: int,
        config: GLMConfig,
        scheme: Scheme | None,
    ):
        self.match, self.scheme = match, None
        if match.scale is not None and scheme is not None:
            self.scheme = scheme.of(part.name)
        self.start, self.shape = start, part.shape(config)
        self._row_axes = len(self.shape) - column_axes(part)
        self.columns = math.prod(self.shape[self._row_axes :])  # elements of a row
        elements = math.prod(match.rule.shape(config))
        order = match.rule.order([x.shape(config) for x in match.rule.parts])

        def stored(tensor: StoredTensor, shape: tuple[int, ...]) -> np.ndarray:
            array = tensor.read()
            first, last = (count * len(array) // elements for count in (start, stop))
            rows = array[first:last] if order is None else array[order[first:last]]
            return rows.reshape(shape)

        if match.scale is None or self.scheme is None:
            self._stored = stored(match.tensor, self.shape)
        else:
            shapes = self.scheme.shapes(self.shape, column_axes(part))
            self._stored = stored(match.tensor, shapes[0])
            self._scales = stored(match.scale, shapes[1])

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all elements in order, as stored or float32, in arrays [n]; finite."""
        columns = full_box(self.shape[self._row_axes :])
        for rows in self.row_pieces():
            yield self.floats((*rows, *columns)).reshape(-1)

    def row_pieces(self) -> Iterator[Box]:
        """Yield all rows in order, in boxes of as many as make a chunk."""
        return row_pieces(full_box(self.shape[: self._row_axes]), self.columns)

    def floats(self, box: Box) -> np.ndarray:
        """Return a box of the elements, as stored or float32; finite."""
        values = block(self._stored, box) if self.scheme is None else self._dequantized(box)
        if not all_finite(values):
            raise self._not_finite(values, box)
        return values

    def quantized(self, rows: Box, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
        """Return integers and float32 scales of complete rows, of the shapes of `Scheme.shapes`.

        A scale is that of all its columns, so that it is the same whoever needs only some. What is
        stored in that scheme is passed on as it is.
        """
        if self.scheme == scheme:
            stored = (self._stored, self._scales)
            values, scales = ((*rows, *full_box(array.shape[self._row_axes :])) for array in stored)
            return self.integers(values), self.scale(scales)
        chunk = self.floats((*rows, *full_box(self.shape[self._row_axes :])))
        pair = quantize(chunk.reshape(-1, self.columns), scheme)
        shapes = scheme.shapes(chunk.shape, chunk.ndim - self._row_axes)
        return pair[0].reshape(shapes[0]), pair[1].reshape(shapes[1])

    def integers(self, box: Box) -> np.ndarray:
        """Return a box of the stored integers; zeros where the scale is zero."""
        columns = _flat(box[self._row_axes :], self._stored.shape[self._row_axes :])
        packed, scales = self._packed(box[: self._row_axes], *columns)
        none = scales < NO_SCALE
        packed = np.where(none, np.int8(0), packed) if none.any() else packed
        return packed.reshape(shape_of(box))

    def scale(self, box: Box) -> np.ndarray:
        """Return a box of the stored scales, float32; 1 where all that it scales is zero.

        The published quantizer writes the scale 0 for a row of zeros. The products are the same,
        and what divides by a scale stays finite.
        """
        scales = self._checked_scales(box)
        return np.where(scales < NO_SCALE, np.float32(1), scales)

    def _checked_scales(self, box: Box) -> np.ndarray:
        scales = block(self._scales, box).astype(np.float32)
        bad = scales[~(np.isfinite(scales) & (scales >= 0))]
        if len(bad):
            raise CheckpointError(
                f"{self.match.name}_scale holds {bad[0]} ({len(bad)} bad values in this block).",
                "A scale must be finite and not negative.",
                _DOWNLOAD_AGAIN,
            )
        return scales

    def _packed(self, rows: Box, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return bytes of rows, [*rows, bytes], and the scale of each, [*rows, bytes or 1]."""
        assert self.scheme is not None
        matrix = self._stored.reshape(*self._stored.shape[: self._row_axes], -1)
        packed, group = block(matrix, (*rows, (begin, end))), self.scheme.group(self.columns)
        if group is None:
            return packed, self._checked_scales(rows)[..., None]
        width = group * self.scheme.bits // 8  # bytes of a group
        first = begin // width
        scales = np.repeat(self._checked_scales((*rows, (first, -(-end // width)))), width, -1)
        return packed, scales[..., begin - first * width : end - first * width]

    def _dequantized(self, box: Box) -> np.ndarray:
        assert self.scheme is not None
        begin, end = _flat(box[self._row_axes :], self.shape[self._row_axes :])
        each = 8 // self.scheme.bits  # columns of a byte
        packed, scales = self._packed(box[: self._row_axes], begin // each, -(-end // each))
        if each == 2:
            packed = unpack_int4(packed)
            scales = scales if scales.shape[-1] == 1 else np.repeat(scales, 2, -1)
        floats, skipped = packed * scales, begin % each
        return floats[..., skipped : skipped + end - begin].reshape(shape_of(box))

    def _not_finite(self, block: np.ndarray, box: Box) -> CheckpointError:
        values, match = block.astype(np.float32), self.match
        found = tuple(np.argwhere(~np.isfinite(values))[0])
        at = [begin + index for (begin, _), index in zip(box, found, strict=True)]
        where = self.start + int(np.ravel_multi_index(at, self.shape))
        layer = "" if match.layer is None else f" (layer {match.layer})"
        return CheckpointError(
            f"{match.name}{layer} holds {values[found]} at element {where}.",
            f"{match.tensor.file} is damaged, or the training that made it failed.",
            _DOWNLOAD_AGAIN,
        )


def row_pieces(rows: Box, columns: int) -> Iterator[Box]:
    """Cut rows of so many columns into boxes of as many as make a chunk, in order."""
    return pieces(rows, CHUNK_ELEMENTS // columns)


def block(array: np.ndarray, box: Box) -> np.ndarray:
    """Return a box of a mapped tensor as a view; the only function that reads stored numbers."""
    return array[slices(box)]


def _flat(columns: Box, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the first column and the one after the last; only the first axis may be cut."""
    inner = math.prod(shape[1:])
    assert columns[1:] == full_box(shape[1:]), "only the first axis of columns is ever cut"
    return columns[0][0] * inner, columns[0][1] * inner


def all_finite(values: np.ndarray) -> bool:
    """Return whether there is neither NaN nor infinity in an array of floats."""
    mask = _EXPONENTS.get(values.dtype.name)
    if mask is None:
        return bool(np.isfinite(values).all())
    return not bool(((values.view(np.uint16) & mask) == mask).any())


def cast(chunk: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Return a chunk of the tensor `name` in another type; too large for it is an error."""
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


def full_box(shape: tuple[int, ...]) -> Box:
    """Return the box of all elements."""
    return tuple((0, size) for size in shape)


def shape_of(box: Box) -> tuple[int, ...]:
    """Return the shape of what a box cuts out."""
    return tuple(stop - start for start, stop in box)


def slices(box: Box, origin: Box | None = None) -> tuple[slice, ...]:
    """Return the box as an index into the array, or into what the box `origin` cuts out of it."""
    starts = [start for start, _ in origin or full_box(shape_of(box))]
    return tuple(slice(b - s, e - s) for (b, e), s in zip(box, starts, strict=True))


def overlap(one: Box, other: Box) -> Box | None:
    """Return what two boxes have in common; None where that is nothing."""
    pairs = zip(one, other, strict=True)
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in pairs)
    return common if all(start < stop for start, stop in common) else None


def pieces(box: Box, limit: int) -> Iterator[Box]:
    """Cut a box into smaller ones of at most `limit` elements, in the order of the elements."""
    size = math.prod(shape_of(box))
    if size <= max(limit, 1):
        yield box
        return
    axis = next(axis for axis, (start, stop) in enumerate(box) if stop - start > 1)
    start, stop = box[axis]
    step = max(limit * (stop - start) // size, 1)
    for begin in range(start, stop, step):
        cut = (begin, min(begin + step, stop))
        yield from pieces((*box[:axis], cut, *box[axis + 1 :]), limit)
