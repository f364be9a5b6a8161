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

_CLEAR = "\r\x1b[K"  # the line of a terminal
_prefix = ""  # of every line, in one of several processes: "process 1: "
_silent = False  # set in a process that prints only errors
_shown_on: TextIO | None = None  # the terminal that a progress line is on


# A progress line has an estimate of the rest when this share is done, or after so many seconds.
_SHARE, _SECONDS = 0.1, 60.0


class Progress:
    """Progress with rate and ETA: one line that is rewritten on a terminal, plain lines elsewhere.

    Args:
        label, total: what is being done ("loading"), and how much; may also come with `update`.
        show: turns an amount into text, e.g. `human_size`.
        stream: where to write; default stderr.
        interval: seconds between two plain lines (a terminal is refreshed ten times a second).
        done: how much was done before; it does not count in the rate.
    """

    def __init__(
        self,
        label: str,
        total: float = 0,
        *,
        show: Callable[[float], str] = lambda amount: f"{amount:.0f}",
        stream: TextIO | None = None,
        interval: float = 5.0,
        done: float = 0,
    ):
        self.label, self.total, self.show, self.before = label, total, show, done
        self.stream = sys.stderr if stream is None else stream
        # Several processes cannot rewrite one line.
        self.terminal = self.stream.isatty() and not _prefix
        self.interval = math.inf if _silent else 0.1 if self.terminal else interval
        self.start = self.last = time.monotonic()

    def __call__(self, done: float, more: str = "") -> None:
        """Record that `done` of `total` is finished; print it, and a figure after the rate, when
        the interval has passed."""
        global _shown_on
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        self.last = now
        took, new = now - self.start, done - self.before
        rate = new / took
        line = f"{escape_controls(self.label)}: {self.show(done)} of {self.show(self.total)}"
        line += f", {self.show(rate)}/s{', ' + escape_controls(more) if more else ''}"
        # The first part also waits for what is loaded or compiled once.
        if rate > 0 and (new >= _SHARE * (self.total - self.before) or took >= _SECONDS):
            line += f", {max(self.total - done, 0) / rate:.0f} s left"
        if self.terminal:  # a line that wraps could not be cleared
            line = _CLEAR + cut_to_width(line, _columns(self.stream) - 1)
            _shown_on = self.stream
        _print(line if self.terminal else f"{_prefix}{line}\n", self.stream)

    def update(self, done: float, total: float) -> None:
        """Record that `done` of a `total` that is known now is finished."""
        self.total = total
        self(done)

    def close(self) -> None:
        """Clear the line on a terminal; elsewhere the lines stay."""
        global _shown_on
        if self.terminal:
            _print(_CLEAR, self.stream)
            _shown_on = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def speak_as(name: str) -> None:
    """Print each line after the name of this process from now on."""
    global _prefix
    _prefix = f"{name}: "


def only_errors(name: str) -> None:
    """Print only errors from now on, each line after `name`: another process prints the rest."""
    global _silent
    _silent = True
    speak_as(name)


def note(text: str) -> None:
    """Print a line for the user that is not part of the answer: on stderr, escaped."""
    global _shown_on
    if not _silent:
        clear = _CLEAR if _shown_on is sys.stderr else ""
        _shown_on = None
        _print(f"{clear}{_prefix}{escape_controls(text)}\n")


def complain(*lines: str) -> None:
    """Print the lines of an error: on stderr, escaped."""
    _print(join_lines(_prefix + line for line in lines) + "\n")


def _print(text: str, stream: TextIO | None = None) -> None:
    """Print at once; work continues if the reader is gone."""
    with contextlib.suppress(OSError):
        print(text, end="", file=stream or sys.stderr, flush=True)


def human_size(size: float) -> str:
    """Return bytes for people: 12487168064 -> "12.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def text_width(text: str) -> int:
    """Return how many columns of a terminal a text takes: East Asian wide characters take two,
    combining marks and invisible characters none."""
    hidden = sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)
    return len(text) - hidden + sum(unicodedata.east_asian_width(char) in "WF" for char in text)


def cut_to_width(text: str, columns: int) -> str:
    """Return the longest beginning of a text that fits into so many columns of a terminal."""
    for at, char in enumerate(text):
        columns -= text_width(char)
        if columns < 0:
            return text[:at]
    return text


def _columns(terminal: TextIO) -> int:
    try:
        return os.get_terminal_size(terminal.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
