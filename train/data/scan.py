"""Reading a file once: the places and lengths of its sequences, and its bad rows."""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glm2_jax.cli.text_input import parse_object
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
    first: Row | None = None  # the row that decided the format, without its data


@dataclass(frozen=True)
class Reading:
    """How to read rows."""

    encoder: Encoder  # turns them into tokens
    max_length: int  # most tokens of a sequence; a longer one makes its row a bad one
    fmt: str = "auto"  # one of FORMATS, or "auto": that of the file's first rows
    # with "auto", the format to use where a row has the keys of several
    preferred: str | None = None


class _MixedFormats(InputError):
    """A fault of the file, not of one row."""


def scan(file: DataFile, reading: Reading, progress: Callable[[int], None]) -> Scan:
    """Read all rows of a file; `progress` is called with the bytes read.

    Raises:
        InputError: the file has no rows, is broken, or mixes formats.
    """
    found = Scan("unknown" if reading.fmt == "auto" else reading.fmt)
    columns = {name: array(kind) for name, kind in COLUMNS.items()}
    for row in file.rows():
        found.rows += 1
        try:
            if isinstance(row.data, InputError):
                raise row.data
            fields = parse_object(row.data)
            if reading.fmt == "auto":
                _agree(found, fields, row, reading.preferred, file)
            for values in _sequences(found, fields, reading):
                place = row.offset, row.line, row.number, row.size, zlib.crc32(row.data)
                for column, value in zip(columns.values(), (*place, *values), strict=True):
                    column.append(value)
        except _MixedFormats:
            raise
        except InputError as error:
            found.bad_reasons[error.what] += 1
            if len(found.bad) < MAX_LISTED:
                reason = f"{error.what.rstrip('.')}: {error.why}" if error.why else error.what
                found.bad.append((row.line, row.number, reason))
        progress(min(row.offset + row.size, file.size))
    if not found.rows:  # an array without elements, a table without rows
        raise no_rows(file.name, *["it has only a header"] * (file.kind == "csv"))
    found.by_line = file.by_line
    found.columns = {name: np.array(values) for name, values in columns.items()}
    return found


def _agree(
    found: Scan, fields: dict[str, Any], row: Row, preferred: str | None, file: DataFile
) -> None:
    """Set the format of a file by its first row with the keys of one, or compare it."""
    fmt = detect(fields, preferred)
    if found.first is None:
        if fmt is None:
            raise unknown_format(fields)
        found.format, found.first = fmt, row._replace(data=b"")
    elif fmt not in (None, found.format):
        word = "line" if file.by_line else "row"
        first, this = (x.line if file.by_line else x.number for x in (found.first, row))
        raise _MixedFormats(
            f"{file.name} mixes formats",
            f"{word} {first} is {found.format}, {word} {this} is {fmt}",
            "Split it into files of one format each.",
        )


def _sequences(found: Scan, fields: dict[str, Any], reading: Reading) -> list[tuple[int, int, int]]:
    """Return number, length and learned tokens of the sequences of a row: all of them, or none."""
    messages = read_messages(fields, found.format)
    sequences = []
    # The last one is the longest: if it is too long, no other one has to be encoded.
    for number in reversed(range(reading.encoder.count(messages))):
        ids, learned = reading.encoder.encode(messages, number)
        if len(ids) > reading.max_length:
            raise InputError("too long", f"{len(ids)} tokens, at most {reading.max_length}")
        sequences.append((number, len(ids), sum(learned)))
    found.unused.update(unused_keys(fields, found.format))
    answers = (message for message in messages if message["role"] == "assistant")
    found.marked += sum(not message.get("loss", True) for message in answers)
    return sequences[::-1]
