"""What `train.augment` prints: how many rows each method made, and examples. Imports no jax."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glm2_jax.cli.tables import table
from glm2_jax.escape import join_lines, json_line
from train.augment.rows import Row


class Counts:
    """How many new rows each method made, and how many of its attempts were rejected, and why."""

    def __init__(self, methods: Iterable[str]):
        self.kept = Counter(dict.fromkeys(methods, 0))
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)

    def keep(self, method: str) -> None:
        """Count a new row."""
        self.kept[method] += 1

    def reject(self, method: str, reason: str) -> None:
        """Count an attempt without a new row."""
        self.reasons[method][reason] += 1

    @property
    def rejected(self) -> int:
        """Attempts of all methods that were rejected."""
        return sum(counter.total() for counter in self.reasons.values())

    def lines(self) -> list[str]:
        """Return a table of the methods."""
        rows = [["method", "kept", "rejected", ""]]
        for method, kept in self.kept.items():
            why = ", ".join(f"{name} {n}" for name, n in self.reasons[method].most_common())
            rows.append([method, str(kept), str(self.reasons[method].total()), why])
        found = table([row[:3] for row in rows], 1)
        return [f"{line}  {row[3]}".rstrip() for line, row in zip(found, rows, strict=True)]

    def facts(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            method: {"kept": kept, "rejected": dict(self.reasons[method])}
            for method, kept in self.kept.items()
        }


def report(rows: int, counts: Counts, *, as_json: bool) -> str:
    """Return the report of a run: a table, or one JSON object."""
    new = counts.kept.total()
    if as_json:
        return json_line({"rows": rows, "new": new, "methods": counts.facts()})
    return join_lines([*counts.lines(), f"rows: {rows}, new: {new}"])


def examples(rows: Sequence[Row], new: Sequence[tuple[int, str, Mapping[str, str]]]) -> str:
    """Return each row's question, and what became of it."""
    lines = []
    for number, row in enumerate(rows):
        lines.append(f"{row.where}: {row.texts[-1]}")
        made = [(method, texts[row.texts[-1]]) for at, method, texts in new if at == number]
        lines += [f"  {method}: {text}" for method, text in made]
    return join_lines(lines)
