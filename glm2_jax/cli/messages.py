"""Notes, errors and progress on stderr."""

import contextlib
import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import TextIO

from glm2_jax.escape import escape_controls, join_lines

_speaker: str | None = None  # set in a process that tells only errors, after this name


class Progress:
    """Progress with rate and ETA: one line that is rewritten on a terminal, plain lines elsewhere.

    Args:
      label: what is being done, e.g. "loading".
      total: how much there is to do.
      show: turns an amount into text, e.g. `human_size`.
      stream: where to write; default stderr.
      interval: seconds between two plain lines (a terminal is refreshed ten times a second).
      done: how much was there before; it has no part in the rate.
    """

    def __init__(
        self,
        label: str,
        total: float,
        *,
        show: Callable[[float], str] = lambda amount: f"{amount:.0f}",
        stream: TextIO | None = None,
        interval: float = 5.0,
        done: float = 0,
    ):
        self.label, self.total, self.show, self.before = label, total, show, done
        self.stream = sys.stderr if stream is None else stream
        silent = _speaker is not None
        self.terminal = self.stream.isatty() and not silent
        self.interval = math.inf if silent else 0.1 if self.terminal else interval
        self.start = self.last = time.monotonic()

    def __call__(self, done: float, more: str = "") -> None:
        """Says that `done` of `total` is finished; writes only when the interval has passed.

        Args:
          more: a figure to show beside the rate.
        """
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        self.last = now
        rate = (done - self.before) / (now - self.start)
        line = f"{escape_controls(self.label)}: {self.show(done)} of {self.show(self.total)}"
        line += f", {self.show(rate)}/s, {escape_controls(more) + ', ' if more else ''}"
        line += f"{max(self.total - done, 0) / max(rate, 1e-9):.0f} s left"
        if self.terminal:  # a line that wraps could not be cleared
            line = cut_to_width(line, _columns(self.stream) - 1)
        _tell(f"\r\x1b[K{line}" if self.terminal else f"{line}\n", self.stream)

    def close(self) -> None:
        """Clears the line on a terminal; elsewhere the lines stay."""
        if self.terminal:
            _tell("\r\x1b[K", self.stream)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def only_errors(name: str) -> None:
    """From here on only errors are told, each line after `name`: another process tells the rest."""
    global _speaker
    _speaker = name


def note(text: str) -> None:
    """One line for the user that is not part of the answer: on stderr, escaped."""
    if _speaker is None:
        _tell(f"{escape_controls(text)}\n")


def _complain(*lines: str) -> None:
    """Lines about an error: on stderr, escaped."""
    prefix = "" if _speaker is None else f"{_speaker}: "
    _tell(join_lines(prefix + line for line in lines) + "\n")


def _tell(text: str, stream: TextIO | None = None) -> None:
    """Writes at once to stderr, or to `stream`; the work goes on where nobody can read it."""
    with contextlib.suppress(OSError):
        print(text, end="", file=stream or sys.stderr, flush=True)


def human_size(size: float) -> str:
    """12487168064 -> "12.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def cut_to_width(text: str, columns: int) -> str:
    """The beginning of a text that fits into so many columns of a terminal.

    East Asian wide characters take two, marks that combine with the one before take none.
    """
    for at, char in enumerate(text):
        if unicodedata.combining(char) or unicodedata.category(char) == "Cf":
            continue
        columns -= 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if columns < 0:
            return text[:at]
    return text


def _columns(terminal: TextIO) -> int:
    try:
        return os.get_terminal_size(terminal.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
