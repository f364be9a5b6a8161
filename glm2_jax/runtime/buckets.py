"""Padded sizes: lengths are rounded up to one of a few, so that few programs are compiled."""

SMALLEST_BUCKET = 64
GROWTH = 4  # a cache grows by this factor; each size has its own programs


def bucket(length: int, largest: int) -> int:
    """Return the smallest power of two from SMALLEST_BUCKET that holds `length`, or `largest`."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, largest)


def padded_batch(count: int, rows: int) -> int:
    """Return B for `count` prompts: a power of two, rounded up to a multiple of `rows`."""
    return -(-(1 << (count - 1).bit_length()) // rows) * rows


def grown(size: int, needed: int, largest: int) -> int:
    """Return the next size of a cache of `size` slots that holds `needed`."""
    while size < needed:
        size *= GROWTH
    return min(size, largest)
