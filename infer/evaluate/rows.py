"""Rows to evaluate on: texts and conversations. Bad rows are reported, not hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from glm2_jax.cli.messages import note
from glm2_jax.errors import InputError

Parsed = TypeVar("Parsed")

BUNDLED = "bundled sample"
_SAMPLE = Path(__file__).parent / "sample.jsonl"


class BadRows:
    """Reports the rows that cannot be used, and refuses more of them than `limit`."""

    def __init__(self, limit: int = 0):
        self.limit, self.count = limit, 0

    def keep(
        self, rows: Iterable[tuple[str, Any]], parse: Callable[[Any], Parsed]
    ) -> list[tuple[str, Parsed]]:
        """Return (where, what `parse` makes of the row) of each (where, row); rows that are, or for
        which it raises, an InputError are reported."""
        good = []
        for where, row in rows:
            try:
                if isinstance(row, InputError):
                    raise row
                good.append((where, parse(row)))
            except InputError as error:
                self.count += 1
                note(f"{where}: {error.cause}")
        return good

    def check(self, good: int) -> None:
        """Raise InputError if no row is left, or more rows are bad than allowed."""
        if not good:
            why = f"bad rows: {self.count}" if self.count else "there is none"
            raise InputError("no row can be used", why)
        if self.count > self.limit:
            raise InputError(
                f"bad rows: {self.count} of {self.count + good}",
                f"--max-bad allows {self.limit}.",
                "Correct them, or raise --max-bad to leave them out.",
            )


def data_file(named: str | None, flag: str = "--data") -> str:
    """Return the file to read, by default the bundled one; `flag` names it."""
    if named is not None:
        return named
    note(f"no {flag} given: using 45 bundled questions, made for the demo model")
    return str(_SAMPLE)
