"""Rows to evaluate on: texts and conversations. Bad rows are reported, not hidden.

A file is plain text, or rows in any format that training reads; a row may also be {"text"} alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.text_input import LARGEST, open_input, parse_line, read_text
from glm2_jax.errors import InputError
from infer.datasets.formats import Message, detect, read_messages, unknown_format
from infer.datasets.index import PACKED, DataFile
from infer.datasets.tables import DELIMITERS, PARQUET

Parsed = TypeVar("Parsed")

BUNDLED = "bundled sample"
CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")
_SAMPLE = Path(__file__).parent / "sample.jsonl"
_BOM = b"\xef\xbb\xbf"
_START = 1 << 12  # bytes that are read to decide whether a file is plain text
_PIECE = 1 << 20


class BadRows:
    """Reports the rows that cannot be used, and refuses more of them than `limit`."""

    def __init__(self, limit: int = 0):
        self.limit, self.count = limit, 0

    def keep(
        self, rows: Iterable[tuple[str, Any]], parse: Callable[[Any], Parsed]
    ) -> list[tuple[str, Parsed]]:
        """Return (where, what `parse` makes of the row) of each (where, row); rows that are, or for
        which it raises, an InputError are reported."""
        good = []
        for where, row in rows:
            try:
                if isinstance(row, InputError):
                    raise row
                good.append((where, parse(row)))
            except InputError as error:
                self.count += 1
                note(f"{where}: {error.cause}")
        return good

    def check(self, good: int) -> None:
        """Raise InputError if no row is left, or more rows are bad than allowed."""
        if not good:
            raise InputError("no row can be used", f"bad rows: {self.count}")
        if self.count > self.limit:
            raise InputError(
                f"bad rows: {self.count} of {self.count + good}",
                f"--max-bad allows {self.limit}.",
                "Correct them, or raise --max-bad to leave them out.",
            )


def data_file(named: str | None, flag: str = "--data") -> str:
    """Return the file to read, by default the bundled one; `flag` names it."""
    if named is not None:
        return named
    note(f"no {flag} given: using 45 bundled questions, made for the demo model")
    return str(_SAMPLE)


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, "-" is standard input: "file:line" (or "file, row N" where a line
    holds several), and a JSON value, an InputError for a bad row, or the string of a plain text.
    InputError: the file cannot be read.
    """
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open_input(path))
        if path == "-" or not Path(path).is_file():  # rows are read at their offsets
            file = _copy(file, path, opened.enter_context(tempfile.TemporaryFile()))
        if not _has_rows(path, file):
            yield path, read_text(file, path)
            return
        data = DataFile(path, file=file)
        opened.callback(data.close)
        # A list: only after all of them it is known how their places are named.
        for row in list(data.rows()):
            value: Any = row.data
            if isinstance(value, bytes):
                try:
                    value = parse_line(value)
                except InputError as error:
                    value = error
            yield data.place(row.line, row.number), value


def _copy(source: BinaryIO, name: str, file: BinaryIO) -> BinaryIO:
    """Copy a pipe or device to a file and rewind it; InputError beyond LARGEST bytes."""
    while piece := source.read(_PIECE):
        file.write(piece)
        if file.tell() > LARGEST:
            why = f"it has more than {human_size(LARGEST)} and is not a regular file"
            raise InputError(f"cannot read {name}", why, "save it to a file first")
    file.seek(0)
    return file


def _has_rows(path: str, file: BinaryIO) -> bool:
    """Return whether a file has rows, by its name or its first bytes, and is not plain text."""
    if path.lower().removesuffix(".gz").endswith((".jsonl", ".json", ".parquet", *DELIMITERS)):
        return True
    start = os.pread(file.fileno(), _START, 0)
    return start.removeprefix(_BOM).lstrip().startswith((b"{", b"[", PARQUET, *PACKED))


def parse_row(row: Any, fmt: str = "auto") -> str | list[Message]:
    """Return the text of a row, or of plain text, or a conversation as `parse_conversation`."""
    if isinstance(row, dict) and fmt == "auto" and "text" in row and detect(row) is None:
        row = row["text"] if isinstance(row["text"], str) else ""
    if not isinstance(row, str):
        return parse_conversation(row, fmt)
    if not row.strip():
        raise InputError("text is empty, or not a string")
    return _checked(row)


def parse_conversation(row: Any, fmt: str = "auto") -> list[Message]:
    """Return the messages of a row, of which the last is an answer; InputError for a bad row.

    `fmt` is one of `infer.datasets.FORMATS`, or "auto": by the keys of the row.
    """
    if not isinstance(row, dict):
        raise InputError("not a JSON object", "write {...} with a value for each key")
    found = detect(row) if fmt == "auto" else fmt
    if found is None:
        raise unknown_format(row)
    messages = read_messages(row, found)
    _checked(json.dumps(messages, ensure_ascii=False))
    return messages


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("it has half of a character (a lone surrogate)") from None
    return text
