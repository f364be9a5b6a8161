"""Where the answers to a batch file go: a file with a journal, or a stream."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from glm2_jax.cli.files import require_file_place
from glm2_jax.errors import UsageError
from infer.generate.journal import SUFFIX, Journal

if TYPE_CHECKING:
    from infer.generate.run import Settings


class InOrder:
    """Writes answers to a stream as soon as all before them are written.

    Args:
        numbers: the lines that will be answered, ascending.
        file: the stream.
    """

    done: Container[int] = ()

    def __init__(self, numbers: Sequence[int], file: TextIO):
        self._numbers = iter(numbers)
        self._next = next(self._numbers, None)
        self._waiting: dict[int, str] = {}
        self._file = file

    def append(self, rows: Iterable[tuple[int, str]]) -> None:
        """Add answers: line number and JSON object."""
        self._waiting.update(rows)
        while self._next in self._waiting:
            self._file.write(self._waiting.pop(self._next) + "\n")  # at once: no half lines
            self._next = next(self._numbers, None)
        self._file.flush()


class Elsewhere:
    """Replaces the journal in all but the first of several processes, which answer the same lines.

    Args:
        done: the lines that the first process has answered already.
    """

    def __init__(self, done: Iterable[int]):
        self.done = set(done)

    def append(self, rows: Iterable[tuple[int, str]]) -> None:
        """Add answers: line number and JSON object."""
        self.done.update(number for number, _ in rows)


Sink = Journal | InOrder | Elsewhere
"""Takes answers; `done` are the numbers of the lines that it has already."""


@contextlib.contextmanager
def open_stream(path: Path | None) -> Iterator[TextIO]:
    """Open a pipe or device, or give standard output, which stays open."""
    if path is None:
        yield sys.stdout
        return
    try:
        with path.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:  # a failed write does not name the file
        error.filename = error.filename or str(path)
        raise


def is_stream(path: Path) -> bool:
    """Return whether this is a pipe or a device, which can have no journal."""
    return path.exists() and not path.is_file()


def check_output(settings: Settings) -> Path | None:
    """Raise before any work if the answers could not be written, or would replace an input.

    Returns:
        The output file, links followed; a pipe or device as it was named, since what /dev/stdout
        leads to need not exist; None for standard output.
    """
    if settings.output in (None, "-"):
        return None
    named = Path(settings.output)
    if is_stream(named) and not named.is_dir():
        return named
    path = require_file_place(named)
    inputs = {"--batch-file": settings.batch_file, "--history": settings.history}
    for written in (path, path.with_name(path.name + SUFFIX)):
        for name, place in {**inputs, "standard input": 0}.items():
            if place not in (None, "-") and _same_file(written, place):
                what = "--output" if written == path else f"{written.name}, which --output needs,"
                raise UsageError(f"{what} is the same file as {name}", fix="name another file")
    model = settings.choice.path
    if model is not None and path.is_relative_to(os.path.realpath(model)):
        raise UsageError(
            f"--output is inside the model's folder {model}", fix="name another folder"
        )
    return path


def _same_file(path: Path, other: str | int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.stat(other))
    except (OSError, ValueError):  # one of them does not exist
        return False


def refuse_existing(output: Path, journal: Journal, overwrite: bool) -> None:
    """Raise UsageError if there are answers that must not be replaced."""
    if overwrite or not output.exists() or not output.stat().st_size or journal.is_output(output):
        return
    raise UsageError(f"{output} exists already", fix="name another file, or add --overwrite")
