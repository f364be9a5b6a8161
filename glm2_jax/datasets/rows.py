"""Reads the rows of a file of texts or conversations.

A file is plain text, or rows in any format that training reads; a row may also be {"text"} alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from glm2_jax.cli.bundled import ROWS, find_bundled
from glm2_jax.cli.messages import human_size
from glm2_jax.cli.text_input import LARGEST, open_input, parse_line, read_text
from glm2_jax.datasets.formats import Message, detect, read_messages, unknown_format
from glm2_jax.datasets.index import PACKED, DataFile
from glm2_jax.datasets.tables import DELIMITERS, PARQUET
from glm2_jax.errors import InputError

_START = 1 << 12  # bytes that are read to decide whether a file is plain text
_PIECE = 1 << 20


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, "-" is standard input: "file:line" (or "file, row N" where a line
    holds several), and a JSON value, an InputError for a bad row, or the string of a plain text.
    InputError: the file cannot be read.
    """
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open_input(path))
        plain = path != "-" and Path(find_bundled(path, ROWS)).is_file()
        if not plain:  # rows are read at their offsets
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


def is_table(path: str) -> bool:
    """Return whether a file has rows by its name."""
    return path.lower().removesuffix(".gz").endswith((".jsonl", ".json", ".parquet", *DELIMITERS))


def _has_rows(path: str, file: BinaryIO) -> bool:
    """Return whether a file has rows, by its name or its first bytes, and is not plain text."""
    if is_table(path):
        return True
    start = os.pread(file.fileno(), _START, 0)
    return start.removeprefix(BOM_UTF8).lstrip().startswith((b"{", b"[", PARQUET, *PACKED))


def parse_row(row: Any, fmt: str = "auto") -> str | list[Message]:
    """Return the text of a row, or of plain text, or a conversation as `parse_conversation`."""
    if isinstance(row, dict) and fmt == "auto" and "text" in row and detect(row) is None:
        row = row["text"] if isinstance(row["text"], str) else ""
    if not isinstance(row, str):
        return parse_conversation(row, fmt)
    if not row.strip():
        raise InputError("text is empty, or not a string")
    return checked_text(row)


def parse_conversation(row: Any, fmt: str = "auto") -> list[Message]:
    """Return the messages of a row, of which the last is an answer; InputError for a bad row.

    `fmt` is one of `glm2_jax.datasets.FORMATS`, or "auto": by the keys of the row.
    """
    if not isinstance(row, dict):
        raise InputError("not a JSON object", "write {...} with a value for each key")
    found = detect(row) if fmt == "auto" else fmt
    if found is None:
        raise unknown_format(row)
    messages = read_messages(row, found)
    checked_text(json.dumps(messages, ensure_ascii=False))
    return messages


def checked_text(text: str) -> str:
    """Return a text; InputError if it cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("it has half of a character (a lone surrogate)") from None
    return text
