"""Reads rows of data files by offset: only the offsets stay in memory.

A file is read once from start to end, a few rows at a time; a row that is needed later is read
again from its offset.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import stat
import tempfile
import weakref
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from io import BufferedReader
from typing import BinaryIO, NamedTuple

from glm2_jax.cli.bundled import ROWS, find_bundled
from glm2_jax.cli.text_input import refuse_wide
from glm2_jax.datasets.tables import (
    PARQUET,
    csv_records,
    delimiter_of,
    is_text,
    parquet_records,
    text_records,
)
from glm2_jax.errors import InputError

MAX_ROW = 16 * 2**20  # bytes; no model could learn from a longer row
_PIECE = 1 << 20
_BLANKS = " \t\r\n"
PACKED = {  # first bytes of files that are not read
    b"PK\x03\x04": (
        "a zip archive or an Excel table",
        "unzip it, or save the table as CSV (UTF-8)",
    ),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "unpack it: zstd -d FILE"),
    b"\xfd7zXZ\x00": ("packed by xz", "unpack it: xz -d FILE"),
    b"BZh": ("packed by bzip2", "unpack it: bzip2 -d FILE"),
    b"\x1f\x8b": ("packed by gzip twice", "unpack it: gzip -d FILE"),
    b"ARROW1": ("an Arrow file", "write it as Parquet or as JSON lines"),
}
_TAIL = 16  # characters at the end of the window whose meaning may change with the next ones


class Row(NamedTuple):
    """A row of a file."""

    line: int  # that it begins in, from 1
    number: int  # of the row, from 1
    offset: int  # of its first byte in the file
    size: int  # in bytes
    data: bytes | InputError  # an error where it cannot be read


class DataFile:
    """A file of rows: JSON lines, one JSON array, or a table, plain or compressed by gzip.

    What gzip unpacks, and the rows of a table as JSON, are kept in unnamed temporary files. A row
    of more than `max_row` bytes is an error. `file` is an open file to read in place of the path.
    With `texts` a file whose name ends in .txt is a plain text: rows of the format "text".
    Raises InputError for a file that cannot be read, is empty, or is UTF-16 or UTF-32.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_row: int = MAX_ROW,
        *,
        file: BinaryIO | None = None,
        texts: bool = False,
    ):
        self.name, self.max_row, self._texts = os.fspath(path), max_row, texts
        opened = contextlib.ExitStack()
        self.close = weakref.finalize(self, opened.close)
        plain = _open(self.name) if file is None else open(os.dup(file.fileno()), "rb")
        self._file = _unpacked(plain, self.name)
        opened.enter_context(self._file)
        self.size = os.fstat(self._file.fileno()).st_size  # in bytes, unpacked
        sample = os.pread(self._file.fileno(), _PIECE, 0)
        self._start = len(BOM_UTF8) if sample.startswith(BOM_UTF8) else 0
        self.kind = self._kind(sample)  # "lines", "array", "csv", "parquet" or "text"
        self.by_line = self.kind != "parquet"  # whether all rows so far begin in different lines
        self.sha256 = ""  # of the contents, after all of `rows`
        self._table: BinaryIO | None = None  # its rows as JSON, where they are read again
        if self.kind in ("csv", "parquet", "text"):
            self._table = opened.enter_context(tempfile.TemporaryFile())

    def _kind(self, sample: bytes) -> str:
        if sample.startswith(PARQUET):
            return "parquet"
        if self.size <= len(sample) and not sample[self._start :].strip():
            raise no_rows(self.name)
        refuse_wide(sample, self.name)
        for start, (what, fix) in PACKED.items():
            if sample.startswith(start):
                raise InputError(f"cannot read {self.name}", f"it is {what}", fix)
        if self._texts and is_text(self.name):
            return "text"
        if delimiter_of(self.name):
            return "csv"
        return "array" if sample[self._start :].lstrip().startswith(b"[") else "lines"

    def rows(self) -> Iterator[Row]:
        """Yield all rows in order, without blank lines; InputError for a broken array or table."""
        self._file.seek(self._start)
        if self._table is not None:
            yield from self._records(self._table)
        elif self.kind == "array":
            line = 0
            for row in _Elements(self._file, self.name, self._start, self.max_row):
                self.by_line &= row.line != line
                line = row.line
                yield row
        else:
            yield from self._lines()
        self.sha256 = self.digest()

    def _lines(self) -> Iterator[Row]:
        line = number = 0
        offset = self._start
        while data := self._file.readline(self.max_row + 1):
            line += 1
            size, found = len(data), data
            if size > self.max_row:
                while not data.endswith(b"\n") and (data := self._file.readline(_PIECE)):
                    size += len(data)
                found = _too_long(size)
            if isinstance(found, InputError) or found.strip():
                number += 1
                yield Row(line, number, offset, size, found)
            offset += size

    def _records(self, table: BinaryIO) -> Iterator[Row]:
        table.seek(0)
        table.truncate()
        self._file.seek(0)
        if self.kind == "parquet":
            records = parquet_records(self._file, self.name)
        else:
            read = text_records if self.kind == "text" else csv_records
            records = read(self._file, self.name, self.max_row)
        offset = 0
        for number, (line, data) in enumerate(records, 1):
            if isinstance(data, bytes) and len(data) > self.max_row:
                data = _too_long(len(data))
            size = 0 if isinstance(data, InputError) else len(data)
            if isinstance(data, bytes):
                with _writing(self.name):
                    table.write(data)
            yield Row(line, number, offset, size, data)
            offset += size
        with _writing(self.name):
            table.flush()

    def place(self, line: int, number: int) -> str:
        """Return where a row is, for people; call it after `rows`."""
        return f"{self.name}:{line}" if self.by_line else f"{self.name}, row {number}"

    def digest(self) -> str:
        """Return the sha256 of the contents, read again."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def restore(self, sha256: str, by_line: bool) -> None:
        """Set the state after `rows`, where the rows are known already."""
        self.sha256, self.by_line = sha256, by_line
        if self._table is not None:
            for _ in self.rows():
                pass

    def read(self, offset: int, size: int) -> bytes:
        """Return the bytes of a row; fewer than `size` where the file was cut since."""
        return os.pread((self._table or self._file).fileno(), size, offset)


def no_rows(name: str, why: str = "it is empty") -> InputError:
    """Return the error for a file without rows."""
    return InputError(f"{name} has no rows", why)


def _open(name: str) -> BufferedReader:
    place = find_bundled(name, ROWS)
    try:
        mode = os.stat(place).st_mode
        if stat.S_ISREG(mode):
            return open(place, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the name
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {name}", reason) from None
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device, and rows are read repeatedly"
    raise InputError(f"cannot read {name}", f"it is {kind}", "name a plain file")


def _unpacked(file: BufferedReader, name: str) -> BufferedReader:
    """Return the file, or for a gzip file, which is closed, its unpacked contents."""
    if os.pread(file.fileno(), 2, 0) != b"\x1f\x8b":
        return file
    with file, tempfile.TemporaryFile() as contents, _writing(name):
        file.seek(0)
        try:
            with gzip.open(file) as source:
                shutil.copyfileobj(source, contents, _PIECE)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"cannot read {name}", f"its gzip data are damaged: {error}") from None
        contents.flush()
        return open(os.dup(contents.fileno()), "rb")


@contextlib.contextmanager
def _writing(name: str) -> Iterator[None]:
    """Turn a failure of the temporary file into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot unpack {name}",
            f"{error.strerror or error}, in {tempfile.gettempdir()}",
            "free some space, or set TMPDIR to a folder with more",
        ) from None


def _too_long(size: int) -> InputError:
    return InputError("the row is too long to be read", f"{size} bytes")


class _Elements:
    """The elements of a JSON array, with a window of the file in memory.

    The window is decoded as Latin-1, a character per byte: the structure of JSON is ASCII, which
    UTF-8 never uses inside other characters. So an index in the text is an offset in the file, and
    the window may end anywhere.
    """

    # Only the end of a value matters here; its contents are dropped.
    _decoder = json.JSONDecoder(
        object_pairs_hook=len, parse_int=len, parse_float=len, parse_constant=len
    )

    def __init__(self, file: BinaryIO, name: str, offset: int, max_row: int):
        self.file, self.name, self.max_row = file, name, max_row
        self.text, self.at = "", 0
        self.offset = offset  # of the window in the file
        self.line = 1  # that `at` is in
        self.ended = False

    def __iter__(self) -> Iterator[Row]:
        self._next_char()
        self._advance(self.at + 1)  # the bracket
        char, number = self._next_char(), 0
        while char != "]":
            end, number = self._end_of_value(), number + 1
            size = end - self.at
            fits = size <= self.max_row
            data = self.text[self.at : end].encode("latin-1") if fits else _too_long(size)
            yield Row(self.line, number, self.offset + self.at, size, data)
            self._advance(end)
            char = self._next_char()
            if char == ",":
                self._advance(self.at + 1)
                self._next_char()
            elif char != "]":
                missing = "a comma is missing after a row"
                why = missing if char else "the end of the array is missing"
                raise self._broken(why, self.at)
        self._advance(self.at + 1)
        if self._next_char():
            raise self._broken("extra text after the end of the array", self.at)

    def _next_char(self) -> str:
        """Advance to the next character that is not blank; "" at the end of the file."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in _BLANKS:
                end += 1
            self._advance(end)
            if end < len(self.text) or self.ended:
                return self.text[end : end + 1]
            self._read_more()

    def _end_of_value(self) -> int:
        """Return where the value at `at` ends, reading as much as needed."""
        while True:
            try:
                end = self._decoder.raw_decode(self.text, self.at)[1]
                if end + _TAIL <= len(self.text) or self.ended:  # a number may continue
                    return end
            except RecursionError:
                raise self._broken("a row is nested too deeply", self.at) from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _TAIL
                if self.ended or not cut:
                    raise self._broken(f"not JSON: {error.msg}", error.pos) from None
                if len(self.text) - self.at > self.max_row:
                    why = f"a row is longer than {self.max_row} bytes, or its end is missing"
                    raise self._broken(why, self.at) from None
            self._read_more()

    def _read_more(self) -> None:
        """Drop what was used and read at least as much as is left: then few retries are needed."""
        left = self.text[self.at :]
        self.offset += self.at
        data = self.file.read(max(_PIECE, len(left)))
        self.text, self.at = left + data.decode("latin-1"), 0
        self.ended = not data

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _broken(self, why: str, at: int) -> InputError:
        line = self.line + self.text.count("\n", self.at, at)
        return InputError(
            f"{self.name}:{line}: {why}",
            "the next row of a broken JSON array cannot be found, so no row can be left out",
            "fix the file, or write one row a line (JSON lines), where bad rows can be left out",
        )
