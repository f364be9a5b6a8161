"""What is told of rows: reasons in a line, equal ones together, numbers with their nouns."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from glm2_jax.errors import InputError

_RANGES = 20  # that are listed of a reason


def counted(number: int, noun: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def joined(error: InputError) -> str:
    """What and why in one line."""
    return f"{error.what.rstrip('.')}: {error.why}" if error.why else error.what


def summed(bad: Iterable[tuple[str, str]], limit: int | None = None) -> tuple[list[str], int]:
    """Lines such as "file:2-9, 12: reason (9 rows)", or "file, row 2-9: ...", one for each file and
    reason.

    Args:
        bad: ("file:line" or "file, row N", reason) in their order.
        limit: of the lines; None = all.

    Returns:
        The lines, in the order of their first rows, and how many rows are in none of them.
    """
    rows: dict[tuple[str, str], list[int]] = {}
    for where, reason in bad:
        number = len(where) - len(where.rstrip("0123456789"))
        rows.setdefault((where[:-number], reason), []).append(int(where[-number:]))
    lines = []
    for (name, reason), numbers in list(rows.items())[:limit]:
        total = f" ({len(numbers)} rows)" if len(numbers) > 1 else ""
        lines.append(f"{name}{_ranges(numbers)}: {reason}{total}")
    left = [] if limit is None else list(rows.values())[limit:]
    return lines, sum(map(len, left))


def _ranges(numbers: list[int]) -> str:
    """ "2-9, 12" of numbers that rise."""
    ranges = []
    for _, group in groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in group]
        ranges.append(f"{found[0]}" if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return ", ".join(ranges[:_RANGES]) + (", ..." if len(ranges) > _RANGES else "")
