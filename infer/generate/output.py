"""Where the answers to a batch file go: a file with a journal, or a stream.

The journal, `OUTPUT.partial`, has a line that says which run it belongs to, and a line for each
answer, on the disk before the next ones are begun. A killed process leaves complete lines and
perhaps the beginning of one, which the next run cuts off. In the end the answers are written in the
order of the input, complete or not at all, and the journal is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from glm2_jax.cli.files import (
    cannot_write_file,
    fsync,
    new_output,
    require_file_place,
    writer_lock,
)
from glm2_jax.cli.messages import note
from glm2_jax.cli.text_input import LARGEST
from glm2_jax.errors import InputError, UsageError

SUFFIX = ".partial"
_START = b'{"journal": "glm2-jax answers", "version": 1, '
_ROW = re.compile(rb'\{"line": ([1-9][0-9]{0,17}), "answer": (\{.*\})\}\n')
# Values of a run that are checksums: they mean nothing to a reader.
_SUMS = {"input": "the batch file", "history": "the history", "model": "the model"}


class Journal:
    """The journal of one output file, locked while it is open. A context manager.

    `done` maps each answered line of the input to the offset and length of its answer here; `lost`
    counts the lines from the first damaged one on, which do not count. With `restart`, what an
    earlier run left is discarded. InputError: another process has it open, or a file of that name
    is not a journal.
    """

    def __init__(self, output: Path, *, restart: bool = False):
        self.output, self.path = output, output.with_name(output.name + SUFFIX)
        self._restart = restart
        self._clear()
        with contextlib.ExitStack() as opened:
            opened.enter_context(writer_lock(self.path, output))
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            opened.callback(os.close, self._file)
            self._read()
            if restart:
                self._clear()
            self._close = opened.pop_all().close

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._end == 0:  # nothing was begun
            self.path.unlink(missing_ok=True)
        self._close()

    def check(self, run: Mapping[str, Any]) -> None:
        """Raise UsageError if the journal belongs to a run in which one of these was different."""
        if self._run is None:
            return
        new, known = json.loads(json.dumps(run)), self._run
        changed = [name for name in new if name not in known or known[name] != new[name]]
        if changed:
            raise UsageError(
                f"{self.path} belongs to another run: "
                + ", ".join(_difference(name, known.get(name), new[name]) for name in changed),
                "Its answers would not be those of this command.",
                "Give the earlier flags to continue that run, or --restart to discard it.",
            )

    def begin(self, run: Mapping[str, Any]) -> None:
        """Continue the run that the journal belongs to, or begin a new one: `run` is all that the
        answers depend on, as JSON values."""
        self.check(run)
        os.ftruncate(self._file, self._end)
        if self._run is None:
            values = json.dumps(run, ensure_ascii=False)
            self._write(_START + values[1:].encode() + b"\n")
            fsync(self.path.parent)
        self._run = dict(run)

    def append(self, rows: Iterable[tuple[int, str]]) -> None:
        """Add answers, each a line number and a JSON object; they are on the disk on return.

        InputError: the disk is full; the journal is unchanged.
        """
        data, places = b"", {}
        for number, answer in rows:
            encoded = answer.encode()
            data += b'{"line": %d, "answer": ' % number
            places[number] = (self._end + len(data), len(encoded))
            data += encoded + b"}\n"
        self._write(data)
        self.done |= places

    def tell(self, rows: int) -> None:
        """Print how many of the rows are answered already, and how to continue after a stop."""
        if self.done:
            note(f"continuing: {len(self.done)} of {rows} answered already")
        if self.lost:
            note(f"warning: {self.path} is damaged; its last {self.lost} lines are answered again")
        again = "run the same command" + " without --restart" * self._restart
        note(f"answers are kept in {self.path}; to continue after a stop, {again}")

    def is_output(self, path: Path) -> bool:
        """Return whether a file has these answers: a run was killed before it ended."""
        if not self.done or not path.is_file():
            return False
        with path.open("rb") as file:
            same = all(file.read(len(answer)) == answer for answer in self._ordered())
            return same and not file.read(1)

    def finish(self) -> None:
        """Write the output in the order of the lines and remove the journal.

        InputError: the disk is full; the journal stays.
        """
        size = sum(length + 1 for _, length in self.done.values())
        with new_output(self.output, lambda: None, needed=size, folder=False) as new:
            with new.open("wb") as file:
                file.writelines(self._ordered())
        self.path.unlink()

    def _ordered(self) -> Iterator[bytes]:
        with self.path.open("rb") as journal:
            for _, (offset, length) in sorted(self.done.items()):
                journal.seek(offset)
                yield journal.read(length) + b"\n"

    def _clear(self) -> None:
        self.done: dict[int, tuple[int, int]] = {}
        self.lost = 0
        self._run: dict[str, Any] | None = None
        self._end = 0  # of the complete lines

    def _read(self) -> None:
        with self.path.open("rb") as file:
            lines = iter(lambda: file.readline(LARGEST), b"")
            header = next(lines, b"")
            if header.startswith(_START) and header.endswith(b"}\n") and _is_json(header):
                self._run = run = json.loads(header)
                if "quantisation" in run:  # the key of runs begun before 0.2
                    run["quantization"] = run.pop("quantisation")
            elif not header.endswith(b"\n") and header[: len(_START)] == _START[: len(header)]:
                return  # it was cut, or is empty
            else:
                raise InputError(
                    f"{self.path} is not a journal of this version",
                    f"A file of that name keeps the answers until {self.output.name} is complete.",
                    "Move it away, or give another --output.",
                )
            self._end = len(header)
            for line in lines:
                row = _ROW.fullmatch(line)
                if not row or not _is_json(row[2]):
                    break  # cut by a kill or a power failure; what follows it counts as lost
                self.done.setdefault(int(row[1]), (self._end + row.start(2), len(row[2])))
                self._end += len(line)
            file.seek(self._end)
            self.lost = sum(line.endswith(b"\n") for line in lines)

    def _write(self, data: bytes) -> None:
        try:
            os.lseek(self._file, self._end, os.SEEK_SET)
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise cannot_write_file(self.path, error) from error
        self._end += len(data)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _difference(name: str, old: Any, new: Any) -> str:
    if name in _SUMS and old and new:
        return f"{_SUMS[name]} has changed"
    texts = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
    old, new = (text if len(text) <= 40 else text[:39] + "…" for text in texts)
    return f"{_SUMS.get(name, name)} was {old} and is {new}"


class InOrder:
    """Writes answers to a stream as soon as all before them, in `numbers`, are written."""

    done: Collection[int] = ()

    def __init__(self, numbers: Sequence[int], file: TextIO):
        self._left, self._file = list(numbers[::-1]), file
        self._waiting: dict[int, str] = {}

    def append(self, rows: Iterable[tuple[int, str]]) -> None:
        """Add answers: line number and JSON object."""
        self._waiting.update(rows)
        while self._left and self._left[-1] in self._waiting:
            self._file.write(self._waiting.pop(self._left.pop()) + "\n")  # at once: no half lines
        self._file.flush()


class Elsewhere:
    """Replaces the journal in all but the first of several processes, which answer the same lines:
    all but those that are `done` already."""

    def __init__(self, done: Iterable[int]):
        self.done = set(done)

    def append(self, rows: Iterable[tuple[int, str]]) -> None:
        """Add answers: line number and JSON object."""
        self.done.update(number for number, _ in rows)


Sink = Journal | InOrder | Elsewhere
"""Takes answers; `done` are the numbers of the lines that it has already."""


def is_stream(path: Path) -> bool:
    """Return whether this is a pipe or a device, which can have no journal."""
    return path.exists() and not path.is_file()


def check_output(
    output: str | None, inputs: Mapping[str, str | None], model: str | None
) -> Path | None:
    """Return the output file, links followed; None for standard output.

    A pipe or device stays as it was named, since what /dev/stdout leads to need not exist.
    UsageError, InputError: the answers could not be written, or would replace an input or be
    put into the model's folder.
    """
    if output in (None, "-"):
        return None
    named = Path(output)
    if is_stream(named) and not named.is_dir():
        return named
    path = require_file_place(named)
    for written in (path, path.with_name(path.name + SUFFIX)):
        for name, place in {**inputs, "standard input": 0}.items():
            if place not in (None, "-") and _same_file(written, place):
                what = "--output" if written == path else f"{written.name}, which --output needs,"
                raise UsageError(f"{what} is the same file as {name}", fix="name another file")
    if model is not None and path.is_relative_to(os.path.realpath(model)):
        raise UsageError(f"--output is inside the model's folder {model}", fix="name another one")
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
