"""Reads rows of tables as JSON objects: CSV and TSV, and Parquet by pyarrow; and the pieces of a
plain text."""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from glm2_jax.cli.text_input import CONVERT, bad_byte
from glm2_jax.errors import InputError, shorten

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = b"PAR1"  # the first and last bytes of such a file
PIECE = 2**18  # bytes of a text after which its next line begins another piece
_BATCH = 256  # rows of a Parquet file in memory at once

Record = tuple[int, bytes | InputError]
"""The line that a row begins in (in a Parquet file its number), and its JSON or an error."""


def delimiter_of(name: str) -> str | None:
    """Return the delimiter of a table in text by its name; None for other files."""
    return DELIMITERS.get(Path(name.lower().removesuffix(".gz")).suffix)


def csv_records(file: BinaryIO, name: str, max_row: int) -> Iterator[Record]:
    """Yield the rows of a table in text, whose first line names its columns.

    Raises InputError if it is not UTF-8 or not CSV, or a line is longer than `max_row` bytes.
    """
    csv.field_size_limit(max_row)
    reader = csv.reader(_text_lines(file, name, max_row), delimiter=delimiter_of(name) or ",")
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            if cells and not header:
                header = [cell.strip() or f"column {n}" for n, cell in enumerate(cells, 1)]
                twice = next((one for one in header if header.count(one) > 1), None)
                if twice is not None:
                    raise InputError(f"{name} has the column {shorten(twice)} twice")
            elif cells and len(cells) != len(header):
                yield (
                    line,
                    InputError(
                        f"{len(cells)} cells, but the header has {len(header)}",
                        "a text with the separator or a line break must be in quotes",
                    ),
                )
            elif cells:
                yield line, _json(dict(zip(header, cells, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{name}:{line}: not CSV", str(error)) from None


def is_text(name: str) -> bool:
    """Return whether a file is a plain text by its name."""
    return name.lower().removesuffix(".gz").endswith(".txt")


def text_records(file: BinaryIO, name: str, max_row: int) -> Iterator[Record]:
    """Yield the pieces of a plain text as rows of the format "text", all but the last of which
    another one continues. InputError as of `csv_records`."""
    line, found, size = 1, [], 0
    for number, text in enumerate(_text_lines(file, name, max_row), 1):
        if size >= PIECE and text.strip():
            yield line, _json({"text": "".join(found), "continues": True})
            line, found, size = number, [], 0
        found.append(text)
        size += len(text.encode())
    yield line, _json({"text": "".join(found)})


def parquet_records(file: BinaryIO, name: str) -> Iterator[Record]:
    """Yield the rows of a Parquet file; InputError if it is damaged, or pyarrow not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{name} is a Parquet file, and pyarrow is not installed",
            fix='pip install pyarrow, or write it as JSON lines with pandas: python -c "import '
            "pandas; pandas.read_parquet('data.parquet').to_json('data.jsonl', orient='records', "
            'lines=True, force_ascii=False)"',
        ) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield number, _json(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read {name}", f"it is not a Parquet file: {error}") from None


def _text_lines(file: BinaryIO, name: str, max_row: int) -> Iterator[str]:
    number = 0
    while line := file.readline(max_row + 1):
        number += 1
        if len(line) > max_row:
            raise InputError(f"{name}:{number}: the line is longer than {max_row} bytes")
        try:
            yield (line.removeprefix(BOM_UTF8) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}:{number}: not UTF-8", bad_byte(error), CONVERT) from None


def _json(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    """Return text for bytes that are UTF-8, dates and decimals; other bytes become an object, which
    is not accepted as text."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        return {"bytes": len(value)}
