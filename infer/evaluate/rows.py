"""What a model is evaluated on: texts, and conversations. Bad rows are told, not hidden.

A file is plain text (one text), or rows in all forms that training reads (`infer.datasets`); a row
may also be {"text"}. Rows and conversations are judged as training judges them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from glm2_jax.cli.json_input import parse_json
from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.text_input import LARGEST, bad_byte, open_input, read_text, read_utf8
from glm2_jax.errors import InputError
from infer.datasets.formats import Message, detect, read_messages, unknown_format
from infer.datasets.index import PACKED, DataFile
from infer.datasets.tables import DELIMITERS, PARQUET

Parsed = TypeVar("Parsed")

BUNDLED = "bundled sample"
CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")
_SAMPLE = Path(__file__).parent / "sample.jsonl"
_BOM = b"\xef\xbb\xbf"
_START = 1 << 12  # bytes that show what a file is
_PIECE = 1 << 20


@dataclass(frozen=True)
class Text:
    """A text by itself.

    Attributes:
      where: file and line.
    """

    where: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the last one is an answer.

    Attributes:
      where: file and line.
      messages: as of `infer.datasets.formats.read_messages`.
    """

    where: str
    messages: tuple[Message, ...]


class BadRows:
    """Counts the rows that cannot be used, says each on stderr, and ends the run at too many.

    Args:
      limit: how many there may be.
    """

    def __init__(self, limit: int = 0):
        self.limit, self.count = limit, 0

    def add(self, where: str, error: InputError) -> None:
        """Says what is wrong with a row."""
        self.count += 1
        reason = ": ".join(part for part in (error.what, error.why) if part)
        note(f"{where}: {reason}")

    def keep(
        self, rows: Iterable[tuple[str, Any]], parse: Callable[[str, Any], Parsed]
    ) -> list[Parsed]:
        """The rows that `parse` (where, row) takes; those of which it raises InputError are told.

        Args:
          rows: (where, row), or (where, InputError) for one that could not even be read.
        """
        good = []
        for where, row in rows:
            try:
                if isinstance(row, InputError):
                    raise row
                good.append(parse(where, row))
            except InputError as error:
                self.add(where, error)
        return good

    def check(self, good: int) -> None:
        """Raises InputError if nothing is left, or more is bad than may be."""
        are = "is" if self.count == 1 else "are"
        if not good:
            raise InputError("no row can be used", f"{self.count} {are} bad" if self.count else "")
        if self.count > self.limit:
            raise InputError(
                f"{self.count} of {self.count + good} rows {are} bad",
                f"--max-bad allows {self.limit}.",
                "Mend them, or raise --max-bad to go on without them.",
            )


def data_file(named: str | None) -> str:
    """The file to read; says so where it is the bundled one."""
    if named is not None:
        return named
    note("no --data given: using 45 bundled questions, made for the demo model")
    return str(_SAMPLE)


def unplaced(rows: Iterable[Any]) -> list[Any]:
    """Dataclasses without where they came from: what several processes have to agree on."""
    return [dataclasses.replace(row, where="") for row in rows]


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with its place: JSON values, or for plain text one string.

    Yields:
      "file:line", or "file, row N" where several rows are in a line, and the JSON value, or an
      InputError that says why there is none.

    Raises:
      InputError: the file cannot be read, or is as a whole no text.
    """
    with contextlib.ExitStack() as opened:
        file = None
        if path == "-" or not Path(path).is_file():  # rows are read from a plain file
            file = opened.enter_context(tempfile.TemporaryFile())
            _copy(path, file)
        if not _has_rows(path, file):
            yield path, read_utf8(path) if file is None else read_text(file, path)
            return
        rows = DataFile(path, file=file)
        opened.callback(rows.close)
        found = [(row.line, row.number, _json(row.data)) for row in rows.rows()]
        for line, number, value in found:
            yield rows.place(line, number), value


def _has_rows(path: str, file: BinaryIO | None) -> bool:
    """Whether a file is one of rows, by its name or how it begins, and not plain text."""
    name = path.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".json", ".parquet", *DELIMITERS)):
        return True
    if file is None:
        with open(path, "rb") as plain:
            start = plain.read(_START)
    else:
        start = os.pread(file.fileno(), _START, 0)
    return start.removeprefix(_BOM).lstrip().startswith((b"{", b"[", PARQUET, *PACKED))


def _copy(path: str, file: BinaryIO) -> None:
    """Copies a pipe or device to a file and rewinds it; InputError beyond LARGEST bytes."""
    left = LARGEST
    with open_input(path) as source:
        while piece := source.read(min(left + 1, _PIECE)):
            left -= len(piece)
            if left < 0:
                raise InputError(
                    f"cannot read {path}",
                    f"it has more than {human_size(LARGEST)} and is not a plain file",
                    "save it to a file first",
                )
            file.write(piece)
    file.seek(0)


def parse_row(where: str, row: Any, fmt: str = "auto") -> Text | Conversation:
    """A row that is a text or a conversation; InputError says what is wrong with it.

    Args:
      fmt: one of FORMATS, or "auto": by its keys.
    """
    if isinstance(row, str):  # a file of plain text
        row = {"text": row}
    if fmt == "auto" and isinstance(row, dict) and "text" in row and detect(row) is None:
        return Text(where, _text(row))
    return parse_conversation(where, row, fmt)


def parse_conversation(where: str, row: Any, fmt: str = "auto") -> Conversation:
    """As `parse_row`, of a row that must be a conversation."""
    if not isinstance(row, dict):
        raise InputError("not a JSON object", "write {...} with a value for each key")
    found = detect(row) if fmt == "auto" else fmt
    if found is None:
        raise unknown_format(row)
    messages = read_messages(row, found)
    _refuse_half_characters(json.dumps(messages, ensure_ascii=False))
    return Conversation(where, tuple(messages))


def _text(row: dict[str, Any]) -> str:
    text = row["text"]
    if not isinstance(text, str):
        raise InputError("no text" if text is None else "text is not a string")
    if not text.strip():
        raise InputError("text is empty")
    _refuse_half_characters(text)
    return text


def _refuse_half_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("it has half of a character (a lone surrogate)") from None


def _json(data: bytes | InputError) -> Any:
    if isinstance(data, InputError):
        return data
    try:
        return parse_json(data.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return InputError("not UTF-8", bad_byte(error))
    except InputError as error:
        return error
