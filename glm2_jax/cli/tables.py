"""Lines and tables for a terminal of any width."""

import shutil
import textwrap
import unicodedata
from collections.abc import Sequence


def columns(most: int = 160) -> int:
    """Return the columns to write in: those of the terminal, at least 20; `most` without one."""
    return max(shutil.get_terminal_size((most, 24)).columns, 20)


def fold(line: str, columns: int, indent: str = "  ") -> list[str]:
    """Break a line into lines of at most `columns` where words allow it; an empty one stays.

    Long words (commands, paths) are kept as they are, so that they can be copied.

    Args:
      indent: of every further line, in addition to the spaces that the line begins with.
    """
    before = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line,
        columns,
        subsequent_indent=before + indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def table(rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Write rows in columns; the first `texts` of them are text, the others numbers."""
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
