"""Reading a file once: the places and lengths of its sequences, and its bad rows."""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glm2_jax.cli.json_input import parse_object
from glm2_jax.errors import InputError
from infer.datasets.encode import Encoder
from infer.datasets.formats import detect, read_messages, unknown_format, unused_keys
from infer.datasets.index import DataFile, Row, no_rows

MAX_LISTED = 10_000  # bad rows whose reasons are kept; all are counted
COLUMNS = {
    "offset": "q", "line": "q", "row": "q", "size": "i", "sum": "I", "number": "i", "length": "i",
    "learned": "i",
}  # fmt: skip
"""One entry per sequence: offset, line, number, size and crc32 of its row, which of the row's
sequences it is, its tokens, and how many of them are learned."""


@dataclass
class Scan:
    """The sequences of a file."""

    format: str = "unknown"  # one of FORMATS, or "unknown"
    by_line: bool = True  # whether every row begins in a line of its own
    rows: int = 0  # number of rows, good and bad
    # (line, number of the row, reason), the first MAX_LISTED
    bad: list[tuple[int, int, str]] = field(default_factory=list)
    # how many there are for each reason, without what is particular to a row
    bad_reasons: Counter[str] = field(default_factory=Counter)
    # keys that have no effect, with the number of rows that have them
    unused: Counter[str] = field(default_factory=Counter)
    marked: int = 0  # answers that are marked as not to be learned
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # COLUMNS as arrays


@dataclass(frozen=True)
class Reading:
    """How to read rows."""

    encoder: Encoder  # turns them into tokens
    max_length: int  # most tokens of a sequence; a longer one makes its row a bad one
    fmt: str = "auto"  # one of FORMATS, or "auto": that of the file's first rows
    # with "auto", the format to use where a row has the keys of several
    preferred: str | None = None


def scan(file: DataFile, reading: Reading, progress: Callable[[int], None]) -> Scan:
    """Read all rows of a file.

    Args:
        progress: called with the bytes read.

    Raises:
        InputError: the file has no rows, is broken, or mixes formats.
    """
    found, format_of = Scan(), _Format(file, reading)
    columns = {name: array(kind) for name, kind in COLUMNS.items()}
    for row in file.rows():
        found.rows += 1
        try:
            _add(found, columns, row, format_of, reading)
        except InputError as error:
            if error is format_of.mixture:
                raise
            found.bad_reasons[error.what] += 1
            if len(found.bad) < MAX_LISTED:
                reason = f"{error.what.rstrip('.')}: {error.why}" if error.why else error.what
                found.bad.append((row.line, row.number, reason))
        progress(min(row.offset + row.size, file.size))
    if not found.rows:  # an array without elements, a table without rows
        raise no_rows(file.name, *["it has only a header"] * (file.kind == "csv"))
    found.format, found.by_line = format_of.name or "unknown", file.by_line
    found.columns = {name: np.array(values) for name, values in columns.items()}
    return found


def _add(
    found: Scan, columns: dict[str, array], row: Row, format_of: _Format, reading: Reading
) -> None:
    """Add the sequences of a row, all of them or none."""
    if isinstance(row.data, InputError):
        raise row.data
    fields = parse_object(row.data)
    fmt = format_of(fields, row)
    messages = read_messages(fields, fmt)
    lengths, learned = [], []
    # The last one is the longest: if it is too long, no other one has to be encoded.
    for number in reversed(range(reading.encoder.count(messages))):
        ids, mask = reading.encoder.encode(messages, number)
        if len(ids) > reading.max_length:
            raise InputError("too long", f"{len(ids)} tokens, at most {reading.max_length}")
        lengths.insert(0, len(ids))
        learned.insert(0, sum(mask))
    found.unused.update(unused_keys(fields, fmt))
    answers = (message for message in messages if message["role"] == "assistant")
    found.marked += sum(not message.get("loss", True) for message in answers)
    n = len(lengths)
    values = {
        "offset": [row.offset] * n, "line": [row.line] * n, "row": [row.number] * n,
        "size": [row.size] * n, "sum": [zlib.crc32(row.data)] * n, "number": range(n),
        "length": lengths, "learned": learned,
    }  # fmt: skip
    for name, column in columns.items():
        column.extend(values[name])


class _Format:
    """The format of a file: as given, or that of the first row that has all the keys of one."""

    def __init__(self, file: DataFile, reading: Reading):
        self._file, self._preferred = file, reading.preferred
        self._detect = reading.fmt == "auto"
        self.name = None if self._detect else reading.fmt
        self._first: Row | None = None
        self.mixture: InputError | None = None

    def __call__(self, fields: dict[str, Any], row: Row) -> str:
        """Return the format of a row.

        Raises:
            InputError: the row has the keys of no format, or those of two; or, and then the error
                is kept as `mixture`, its format is not that of the rows before.
        """
        found = detect(fields, self._preferred) if self._detect else None
        if self.name is None:
            if found is None:
                raise unknown_format(fields)
            self.name, self._first = found, row
        elif found is not None and found != self.name and self._first is not None:
            word = "line" if self._file.by_line else "row"
            first, this = (r.line if word == "line" else r.number for r in (self._first, row))
            self.mixture = InputError(
                f"{self._file.name} mixes formats",
                f"{word} {first} is {self.name}, {word} {this} is {found}",
                "Split it into files of one format each.",
            )
            raise self.mixture
        return self.name
