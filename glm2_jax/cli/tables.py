"""Tables on a terminal."""

import unicodedata
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Columns under each other; the first `texts` of them are text, the others numbers."""
    widths = [max(_width(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(
            cell + pad if at < texts else pad + cell
            for at, cell in enumerate(row)
            if (pad := " " * (widths[at] - _width(cell))) is not None
        ).rstrip()
        for row in rows
    ]


def _width(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
