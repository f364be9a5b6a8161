"""Padded sizes: every length is rounded up to one of a few, so that few programs are compiled."""

SMALLEST_BUCKET = 64
GROWTH = 4  # times as many slots in the next one; each size has its own programs


def bucket(length: int, largest: int) -> int:
    """The smallest power of two from SMALLEST_BUCKET that holds `length`, at most `largest`."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, largest)


def padded_batch(count: int, rows: int) -> int:
    """B for so many prompts: a power of two, rounded up to a multiple of `rows`."""
    return -(-(1 << (count - 1).bit_length()) // rows) * rows


def grown(size: int, needed: int, largest: int) -> int:
    """The size of the cache that follows one of `size` slots and holds `needed`."""
    while size < needed:
        size *= GROWTH
    return min(size, largest)
