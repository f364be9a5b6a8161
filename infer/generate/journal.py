"""The journal of a batch: what is answered already is safe while the rest is being answered.

`OUTPUT.partial` lies beside OUTPUT while a batch runs. Its first line says which run it belongs to;
after it comes a line for each answer in the order in which they were finished, on the disk before
the next ones are begun. A process may be killed at any byte: what it leaves is complete lines and
perhaps the beginning of one, which the next run of the same command cuts off. When all is answered,
the answers are written in the order of the input under another name, renamed to OUTPUT, and the
journal is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glm2_jax.cli.files import fsync
from glm2_jax.cli.messages import note
from glm2_jax.cli.text_input import LARGEST
from glm2_jax.errors import InputError, UsageError

SUFFIX = ".partial"
_KIND = b'{"journal": "glm2-jax answers", '
_VERSION = b'"version": 1, '
_ROW = re.compile(rb'\{"line": ([1-9][0-9]{0,17}), "answer": (\{.*\})\}\n')
_FINISHED = re.compile(rb'\{"finished": "([0-9a-f]{64})"\}\n')
# What is told apart by a sum, whose values would say nothing to anybody.
_SUMS = {"input": "the batch file", "history": "the history", "model": "the model"}


class Journal:
    """The journal of one output file, locked as long as it is open. A context manager.

    Attributes:
      path: of the journal.
      done: line number in the input -> place and length in the journal of its answer.
      lost: how many more lines it has, from the first damaged one on; they do not count.
      again: how a run that ended early is continued, in words.

    Args:
      output: where the answers will be in the end; need not exist, its folder must.
      restart: throw away what an earlier run has left.

    Raises:
      InputError: another process is at it, or a file of that name is no journal.
    """

    def __init__(self, output: Path, *, restart: bool = False):
        self.output, self.path = output, output.with_name(output.name + SUFFIX)
        self.done: dict[int, tuple[int, int]] = {}
        self.lost = 0
        self.again = "run the same command" + (" without --restart" if restart else "")
        self._finished: str | None = None  # the sum of the output, once that is complete
        self._end = 0  # of the lines that are whole
        self._file = _open_locked(self.path, output)
        try:
            self._run = self._read()
        except BaseException:
            os.close(self._file)
            raise
        if restart:
            os.ftruncate(self._file, 0)
            self.done, self._finished, self._end, self._run = {}, None, 0, None
            self.lost = 0

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._end == 0:  # nothing was begun
            self.path.unlink(missing_ok=True)
        os.close(self._file)

    def check(self, run: Mapping[str, Any]) -> None:
        """Raises UsageError if the journal belongs to a run in which one of these was different."""
        if self._run is None:
            return
        new = json.loads(json.dumps(run))
        known = self._run
        changed = [name for name in new if name not in known or known[name] != new[name]]
        if changed:
            raise UsageError(
                f"{self.path} belongs to another run: "
                + ", ".join(_difference(name, known.get(name), new[name]) for name in changed),
                "Its answers would not be those of this command.",
                "Give the earlier flags to continue that run, or --restart to throw it away.",
            )

    def begin(self, run: Mapping[str, Any]) -> None:
        """Continues the run that the journal belongs to, or begins it.

        Args:
          run: all that the answers depend on, as JSON values.

        Raises:
          UsageError: as in `check`. InputError: the disk is full.
        """
        self.check(run)
        if self._run is None:
            os.ftruncate(self._file, 0)
            values = json.dumps(run, ensure_ascii=False)
            self._write(_KIND + _VERSION + values[1:].encode() + b"\n")
            fsync(self.path.parent)
        else:
            os.ftruncate(self._file, self._end)
        self._run = dict(run)

    def append(self, rows: Iterable[tuple[int, str]]) -> None:
        """Adds answers, each a line number and a JSON object; they are on the disk on return.

        Raises:
          InputError: the disk is full; the journal is as it was.
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
        """Says what there is already of so many rows, and how to continue after a stop."""
        if self.done:
            note(f"continuing: {len(self.done)} of {rows} answered already")
        if self.lost:
            note(
                f"warning: {self.path} is damaged: what its last {self.lost} lines held "
                "is answered again"
            )
        note(f"answers are kept in {self.path}; to continue after a stop, {self.again}")

    def is_output(self, path: Path) -> bool:
        """Whether a file is the complete output of this very run, which a kill kept from ending."""
        if self._finished is None or not path.is_file():
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self._finished

    def finish(self) -> None:
        """Writes the output in the order of the lines and removes the journal.

        Raises:
          InputError: the disk is full; the journal stays.
        """
        ordered = self.path.with_name(self.path.name + ".ordered")
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as journal, ordered.open("wb") as file:
                for number in sorted(self.done):
                    place, length = self.done[number]
                    journal.seek(place)
                    answer = journal.read(length) + b"\n"
                    digest.update(answer)
                    file.write(answer)
                file.flush()
                os.fsync(file.fileno())
            self._write(b'{"finished": "%s"}\n' % digest.hexdigest().encode())
            ordered.replace(self.output)
        except BaseException as error:
            ordered.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise self._cannot_write(error) from error
            raise
        fsync(self.output.parent)
        self.path.unlink()

    def _read(self) -> dict[str, Any] | None:
        """Takes in the lines that are whole; returns the first, or None if it never was."""
        with self.path.open("rb") as file:
            lines = iter(lambda: file.readline(LARGEST), b"")
            header = next(lines, b"")
            run = self._header(header)
            if run is None:
                return None
            self._end = len(header)
            for line in lines:
                row, finished = _ROW.fullmatch(line), _FINISHED.fullmatch(line)
                if finished:
                    self._finished = finished[1].decode()
                elif row and _is_json(row[2]):
                    self.done.setdefault(int(row[1]), (self._end + row.start(2), len(row[2])))
                else:
                    break  # torn, by a kill or with the power; what follows it counts as lost
                self._end += len(line)
            file.seek(self._end)
            self.lost = sum(line.endswith(b"\n") for line in lines)
        return run

    def _header(self, line: bytes) -> dict[str, Any] | None:
        start = _KIND + _VERSION
        if line.endswith(b"}\n") and line.startswith(start) and _is_json(line):
            return json.loads(line)
        if not line.endswith(b"\n") and (start.startswith(line) or line.startswith(start)):
            return None
        version = " of this version" if line.startswith(_KIND) else ""
        raise InputError(
            f"{self.path} is not a journal{version}",
            f"A file of that name keeps the answers until {self.output.name} is complete.",
            "Move it away, or give another --output.",
        )

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
            raise self._cannot_write(error) from error
        self._end += len(data)

    def _cannot_write(self, error: OSError) -> InputError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return InputError(
            f"cannot write beside {self.output}: {error.strerror or error}",
            f"{len(self.done)} answers are safe in {self.path.name}.",
            f"{'Free some space' if full else 'Mend it'} and {self.again} to continue.",
        )


def _open_locked(path: Path, output: Path) -> int:
    """A descriptor of the journal, made if it is not there, with the lock that goes with it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise InputError(
                f"another process is writing {output}",
                f"It holds the lock of {path.name}.",
                "Wait for it, or give another --output.",
            ) from None
        except OSError:
            note(f"warning: {path.parent} has no locks; start no second run with this --output")
        # The other process may have removed it in between: then this is a file without a name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


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
