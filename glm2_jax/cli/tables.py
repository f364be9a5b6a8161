"""Lines and tables for a terminal of any width."""

import shutil
import textwrap
from collections.abc import Iterator, Sequence

from glm2_jax.cli.messages import text_width


def columns(most: int = 160) -> int:
    """Return the columns to write in: those of the terminal, at least 20; `most` without one."""
    return max(shutil.get_terminal_size((most, 24)).columns, 20)


def fold(line: str, columns: int, indent: str = "  ") -> list[str]:
    """Break a line into lines of at most `columns`, the further ones indented more; an empty one
    stays. Long words (commands, paths) are kept as they are, so that they can be copied."""
    indent = " " * (len(line) - len(line.lstrip())) + indent
    wrap = textwrap.TextWrapper(
        columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return wrap.wrap(line) or [""]


def table(rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Write rows in columns; the first `texts` of them are text, the others numbers."""
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


def fitted(rows: Sequence[Sequence[str]], texts: int, columns: int) -> Iterator[str]:
    """Write a table; where it is too wide, as several with the same first column.

    The first `texts` columns are text, the others numbers.
    """
    first, *rest = zip(*rows, strict=True)
    while rest:
        count = len(rest)
        while True:
            lines = table(list(zip(first, *rest[:count], strict=True)), texts)
            if count == 1 or max(map(text_width, lines)) <= columns:
                break
            count -= 1
        yield from lines
        rest, texts = rest[count:], max(texts - count, 1)
        if rest:
            yield ""
