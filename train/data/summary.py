"""Summaries of rows for people: rows with the same reason in one line, numbers with their nouns."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

_RANGES = 20  # ranges of rows that a line lists


def counted(number: int, noun: str) -> str:
    """Return "1 row", "2 rows"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def summed(bad: Iterable[tuple[str, str]], limit: int | None = None) -> tuple[list[str], int]:
    """Summarize bad rows in lines such as "file:2-9, 12: reason (9 rows)".

    Args:
        bad: ("file:line" or "file, row N", reason) in their order.
        limit: most lines; None = no limit.

    Returns:
        One line for each file and reason, in the order of their first rows, and how many rows are
        in none of them.
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
    """Return "2-9, 12" of ascending numbers."""
    ranges = []
    for _, group in groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in group]
        ranges.append(f"{found[0]}" if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return ", ".join(ranges[:_RANGES]) + (", ..." if len(ranges) > _RANGES else "")
