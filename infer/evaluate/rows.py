"""What a model is evaluated on: texts, and questions with answers. Bad rows are told, not hidden.

A file is plain text (one text), JSON lines, or a JSON list. A row is {"text"}, or a question with
its answer: {"instruction", "input", "output"} or {"content", "summary"}, optionally with `history`
and `system`. Other keys are left alone.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from convert.cli import note
from glm2_jax.errors import InputError
from infer.requests import Turns, parse_history, parse_json
from infer.text_input import guess_encoding, open_input, peek, read_lines, read_text

Parsed = TypeVar("Parsed")

BUNDLED = "bundled sample"
_SAMPLE = Path(__file__).parent / "sample.jsonl"
_ANSWERS = (("instruction", "output"), ("content", "summary"))
_PAIRS = '{"instruction", "input", "output"} or {"content", "summary"}'
_FORMS = f'{{"text"}}, {_PAIRS}'


@dataclass(frozen=True)
class Text:
    """A text by itself.

    Attributes:
      where: file and line.
    """

    where: str
    text: str


@dataclass(frozen=True)
class Pair:
    """A question and the answer that is wanted.

    Attributes:
      where: file and line.
    """

    where: str
    question: str
    answer: str
    history: Turns = ()
    system: str | None = None


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
    """The rows of a file, each with its place: JSON objects, or for plain text one string.

    Yields:
      "file:line" and the JSON value, or an InputError that says why there is none.

    Raises:
      InputError: the file cannot be read, or is as a whole no text.
    """
    with open_input(path) as file:
        start = peek(file).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if start == b"[":
            yield from _json_list(path, read_text(file, path))
        elif start == b"{" or path.endswith((".jsonl", ".json")):
            for number, line in read_lines(file, path):
                where = f"{path}:{number}"
                yield where, line if isinstance(line, InputError) else _json_line(line)
        else:
            yield path, read_text(file, path)


def parse_text_or_pair(where: str, row: Any) -> Text | Pair:
    """A row of any form; InputError says what is wrong with it."""
    if isinstance(row, str):  # a file of plain text
        row = {"text": row}
    if isinstance(row, dict) and "text" in row:
        return Text(where, _text(row, "text"))
    return parse_pair(where, row, _FORMS)


def parse_pair(where: str, row: Any, forms: str = _PAIRS) -> Pair:
    """A question with its answer; InputError says what is wrong with the row.

    Args:
      forms: what a row may be, for the message.
    """
    if not isinstance(row, dict):
        raise InputError("not a JSON object", f"write {forms}")
    for asked, answered in _ANSWERS:
        if asked in row or answered in row:
            question, answer = _text(row, asked), _text(row, answered)
            break
    else:
        raise InputError("no key that is known here", f"write {forms}")
    if row.get("input"):
        question += "\n" + _text(row, "input")
    system = _text(row, "system") if row.get("system") else None
    return Pair(where, question, answer, parse_history(row.get("history")), system)


def _text(row: dict[str, Any], key: str) -> str:
    text = row.get(key)
    if not isinstance(text, str):
        raise InputError(f"no {key}" if text is None else f"{key} is not a string")
    if not text.strip():
        raise InputError(f"{key} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{key} has half of a character (a lone surrogate)") from None
    return text


def _json_line(line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return InputError(
            "not UTF-8", f"byte {error.start + 1} cannot be read; {guess_encoding(line)}?"
        )
    except InputError as error:
        return error


def _json_list(path: str, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = parse_json(text)
    except InputError as error:
        raise InputError(f"{path}: {error.what}", error.why) from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row
