"""Boxes, the parts of arrays: (first index, the one after the last) along each axis.

A mesh cuts every array into equal boxes, of which a process holds some; without a mesh there is one
box, the complete array. What is read from files and what is written to devices are boxes, too.
"""

import math
from collections.abc import Iterator

Box = tuple[tuple[int, int], ...]


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
