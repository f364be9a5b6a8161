"""Rows of data files by their place: of a file only the offsets of its rows stay in memory.

A file is JSON lines or one JSON array. Both are read once from begin to end, a few rows at a time;
a row that is wanted later is read again from its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import weakref
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from glm2_jax.errors import InputError
from infer.params import shown
from infer.text_input import refuse_wide

MAX_ROW = 16 * 2**20  # bytes; no row that a model could learn from is as long
_PIECE = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BLANKS = " \t\r\n"
_TAIL = 16  # characters at the end of what was read that may mean something else with the rest


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        line: the line that it begins in, from 1.
        offset: of its first byte in the file.
        size: in bytes.
        data: its bytes, or None if it is longer than is read.
    """

    line: int
    offset: int
    size: int
    data: bytes | None


class DataFile:
    """A file of rows.

    Args:
        path: of a plain file.
        max_row: bytes; of a longer row nothing is kept.

    Attributes:
        name: the path as text.
        size: of the file, in bytes.
        sha256: of its contents, once `rows` has come to its end.

    Raises:
        InputError: it cannot be read, is empty, is UTF-16 or UTF-32, or begins with an object that
            goes on in the next line, so that lines are no rows.
    """

    def __init__(self, path: str | os.PathLike[str], max_row: int = MAX_ROW):
        self.name = os.fspath(path)
        self.max_row = max_row
        self.sha256 = ""
        self._fd = _open(self.name)
        self.close = weakref.finalize(self, os.close, self._fd)  # no row can be read after it
        self.size = os.fstat(self._fd).st_size
        sample = self.read(0, _PIECE)
        if self.size <= len(sample) and not sample.removeprefix(_BOM).strip():
            raise no_rows(self.name)
        refuse_wide(sample, self.name)
        self._start = len(_BOM) if sample.startswith(_BOM) else 0
        self._is_array = sample[self._start :].lstrip().startswith(b"[")
        if not self._is_array:
            _refuse_spread(sample[self._start :], self.name, cut=self.size > len(sample))

    def rows(self) -> Iterator[Row]:
        """All rows in their order; blank lines are none.

        Raises:
            InputError: a JSON array that is broken, where nothing tells where its next row begins.
        """
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            source = _Hashed(file)
            source.read(self._start)
            if self._is_array:
                yield from _Elements(source, self.name, self._start, self.max_row)
            else:
                yield from _lines(source, self._start, self.max_row)
            self.sha256 = source.sha256.hexdigest()

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of a row; fewer than `size` where the file has become shorter."""
        return os.pread(self._fd, size, offset)


def no_rows(name: str) -> InputError:
    """What is wrong with a file that has none."""
    return InputError(f"{name} has no rows", "it is empty")


def _open(name: str) -> int:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its other end
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the name
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {name}", reason) from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device, and rows are read repeatedly"
    raise InputError(f"cannot read {name}", f"it is {kind}", "name a plain file")


def _refuse_spread(sample: bytes, name: str, *, cut: bool) -> None:
    """Raises InputError for a file whose first JSON object is not at its end with its line."""
    text = sample.decode("latin-1").strip(_BLANKS)  # see `_Elements`
    if not text.startswith("{"):
        return
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        if not cut or error.pos < len(text) - _TAIL:  # a bad row, of which there may be good ones
            return
        value, end = {}, len(text)
    except (RecursionError, ValueError):
        return
    if "\n" not in text[:end]:
        return
    key = next((key for key, inner in value.items() if isinstance(inner, list)), None)
    inside = "" if key is None else f"; are the rows the list under {shown(key)}?"
    raise InputError(
        f"{name} begins with a JSON object over several lines, not with a row",
        f"of JSON lines each line is a row{inside}",
        "write each row into a line of its own, or all of them as one array: [...]",
    )


class _Hashed:
    """A file, and the sum of what has been read of it."""

    def __init__(self, file: BinaryIO):
        self._file, self.sha256 = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        return data

    def readline(self, size: int) -> bytes:
        data = self._file.readline(size)
        self.sha256.update(data)
        return data


def _lines(source: _Hashed, offset: int, max_row: int) -> Iterator[Row]:
    number = 0
    while line := source.readline(max_row + 1):
        number += 1
        size, data = len(line), line
        if size > max_row:
            data = None
            while not line.endswith(b"\n") and (line := source.readline(_PIECE)):
                size += len(line)
        if data is None or data.strip():
            yield Row(number, offset, size, data)
        offset += size


class _Elements:
    """The elements of a JSON array, with a window of the file in memory.

    The window is read as Latin-1, in which a character is a byte: all that gives JSON its structure
    is ASCII, which UTF-8 never uses inside other characters. So a place in the text is a place in
    the file, and the window may end anywhere.
    """

    # Only the end of a value matters here; what it holds is not kept.
    _decoder = json.JSONDecoder(
        object_pairs_hook=len, parse_int=len, parse_float=len, parse_constant=len
    )

    def __init__(self, source: _Hashed, name: str, offset: int, max_row: int):
        self.source, self.name, self.max_row = source, name, max_row
        self.text, self.at = "", 0
        self.offset = offset  # of the window in the file
        self.line = 1  # that `at` is in
        self.ended = False

    def __iter__(self) -> Iterator[Row]:
        self._next_char()
        self._advance(self.at + 1)  # the bracket
        char = self._next_char()
        while char != "]":
            end = self._end_of_value()
            size = end - self.at
            data = self.text[self.at : end].encode("latin-1") if size <= self.max_row else None
            yield Row(self.line, self.offset + self.at, size, data)
            self._advance(end)
            char = self._next_char()
            if char == ",":
                self._advance(self.at + 1)
                self._next_char()
            elif char != "]":
                why = "there is no comma after a row" if char else "the array has no end"
                raise self._broken(why, self.at)
        self._advance(self.at + 1)
        if self._next_char():
            raise self._broken("something follows the end of the array", self.at)

    def _next_char(self) -> str:
        """Goes on to the next character that is not blank; "" at the end of the file."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in _BLANKS:
                end += 1
            self._advance(end)
            if end < len(self.text):
                return self.text[end]
            if self.ended:
                return ""
            self._read_more()

    def _end_of_value(self) -> int:
        """Where the value ends that begins at `at`, reading on as far as it takes."""
        while True:
            try:
                end = self._decoder.raw_decode(self.text, self.at)[1]
                if end + _TAIL <= len(self.text) or self.ended:  # a number may go on
                    return end
            except RecursionError:
                raise self._broken("a row is nested too deeply", self.at) from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _TAIL
                if self.ended or not cut:
                    raise self._broken(f"not JSON: {error.msg}", error.pos) from None
                if len(self.text) - self.at > self.max_row:
                    raise self._broken(
                        f"a row is longer than {self.max_row} bytes, or its end is missing", self.at
                    ) from None
            self._read_more()

    def _read_more(self) -> None:
        """Drops what is done with and reads as much as is left again, so that few tries do."""
        left = self.text[self.at :]
        self.offset += self.at
        data = self.source.read(max(_PIECE, len(left)))
        self.text, self.at = left + data.decode("latin-1"), 0
        self.ended = not data

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _broken(self, why: str, at: int) -> InputError:
        line = self.line + self.text.count("\n", self.at, at)
        return InputError(
            f"{self.name}:{line}: {why}",
            "in a JSON array nothing tells where the next row begins, so none can be left out",
            "mend the file, or write one row a line (JSON lines), where bad rows can be left out",
        )
