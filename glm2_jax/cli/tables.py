"""Tables and folded lines on a terminal."""

import textwrap
from collections.abc import Sequence

from glm2_jax.cli.messages import text_width


def table(rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Align cells in columns; the first `texts` columns are text, the others numbers."""
    widths = [max(map(text_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        pads = [" " * (width - text_width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [
            cell + pad if at < texts else pad + cell
            for at, (cell, pad) in enumerate(zip(row, pads, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def fold(line: str, columns: int) -> list[str]:
    """Fold a line into lines of at most `columns`, the later ones indented by two more.

    Words stay complete, so that commands and paths can be copied. An empty line stays.
    """
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(
        line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]
