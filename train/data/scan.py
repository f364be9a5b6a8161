"""Reading a file once: the places and lengths of its sequences, and its bad rows.

Scans of large files are cached in the user's cache folder: about 53 bytes a sequence, no text and
no tokens. The name of an entry is a hash of everything that it depends on: the contents of the
file, the tokenizer, how rows are read, and the code that reads them. It gets this name when it is
complete, so parallel and killed processes cannot harm each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from glm2_jax.cli.messages import note
from glm2_jax.cli.text_input import parse_object
from glm2_jax.datasets import PREFERENCE
from glm2_jax.datasets.encode import Encoder
from glm2_jax.datasets.formats import (
    detect,
    origin_source,
    read_messages,
    unknown_format,
    unused_keys,
)
from glm2_jax.datasets.index import DataFile, Row, no_rows
from glm2_jax.datasets.pairs import SIDES, read_pair
from glm2_jax.datasets.tables import is_text
from glm2_jax.errors import InputError
from glm2_jax.runtime.compile_cache import trim, user_cache

VARIABLE = "GLM2_JAX_DATA_CACHE"
MAX_BYTES = 2**30
SMALL = 2**20  # bytes of a file that is encoded in a few seconds
_ENDING = "-cache"
_FACTS = ("format", "by_line", "rows", "bad", "bad_reasons", "unused", "marked")
_CODE = (
    "glm2_jax.text.prompt", "glm2_jax.text.tokenizer", "glm2_jax.text.roles",
    "glm2_jax.datasets.encode", "glm2_jax.datasets.formats", "glm2_jax.datasets.index",
    "glm2_jax.datasets.pairs", "glm2_jax.datasets.tables", "glm2_jax.datasets.texts", __name__,
)  # fmt: skip
MAX_LISTED = 10_000  # bad rows whose reasons are kept; all are counted
COLUMNS = {
    "offset": "q", "line": "q", "row": "q", "size": "i", "sum": "I", "origin": "Q", "number": "i",
    "length": "i", "learned": "i",
}  # fmt: skip
"""One entry per sequence: offset, line, number, size, crc32 and origin of its row (a hash, 0 =
none), which of the row's sequences it is, its tokens, and how many of them are learned."""


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
    """Read all rows of a file; `progress` is called with the bytes read. InputError where the file
    has no rows, is broken, or mixes formats."""
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
                entry = (*place, _origin(fields), *values)
                for column, value in zip(columns.values(), entry, strict=True):
                    column.append(value)
        except _MixedFormats:
            raise
        except InputError as error:
            if found.rows == 1 and error.what == "not JSON" and is_text(file.name):
                why, fix = f"line {row.line}: {error.cause}", "For plain text, use --format text."
                raise InputError(f"{file.name} does not hold rows", why, fix) from None
            found.bad_reasons[error.what] += 1
            if len(found.bad) < MAX_LISTED:
                found.bad.append((row.line, row.number, error.cause))
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
    """Return number, length and learned tokens of the sequences of a row: all of them, or none. A
    pair counts as one."""
    if found.format == PREFERENCE:
        return [_pair(fields, reading)]
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


def _origin(fields: dict[str, Any]) -> int:
    source = origin_source(fields)
    return 0 if source is None else hash_origin(source)


def hash_origin(source: str) -> int:
    """Return a hash of the place of a row, for the column of origins."""
    digest = hashlib.blake2b(source.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _pair(fields: dict[str, Any], reading: Reading) -> tuple[int, int, int]:
    total = count = 0
    for key, messages in zip(SIDES, read_pair(fields), strict=True):
        if not reading.encoder.count(messages):
            raise InputError(f"{key} is marked as not to be learned")
        ids, learned = reading.encoder.encode(messages, 0)
        if len(ids) > reading.max_length:
            raise InputError(
                f"{key} is too long", f"{len(ids)} tokens, at most {reading.max_length}"
            )
        total, count = total + len(ids), count + sum(learned)
    return 0, total, count


def cached_scan(
    file: DataFile, reading: Reading, progress: Callable[[int], None], folder: str | None
) -> Scan:
    """Return what `scan` finds, for a large file from the cache where it has an entry.

    `folder`: None = $GLM2_JAX_DATA_CACHE or the user's cache folder; "off" = no cache.
    """
    place = None
    if file.size > SMALL:
        try:
            place = user_cache("data", VARIABLE, folder)
        except (OSError, RuntimeError) as error:  # no home folder
            note(f"warning: no data cache ({error})")
    if place is None:
        return scan(file, reading, progress)
    digest = file.digest()
    path = place / (_key(digest, file.kind, reading) + _ENDING)
    found = _read(path)
    if found is not None:
        file.restore(digest, found.by_line)
        progress(file.size)
        return found
    found = scan(file, reading, progress)
    if file.sha256 == digest:  # it did not change meanwhile
        try:
            _write(path, found)
        except OSError as error:
            note(f"warning: the data cache cannot be written ({error})")
    return found


def _write(path: Path, found: Scan) -> None:
    facts = json.dumps({name: getattr(found, name) for name in _FACTS})
    arrays: dict[str, Any] = {"facts": np.array(facts), **found.columns}
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_ENDING}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
        trim(path.parent, MAX_BYTES)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _read(path: Path) -> Scan | None:
    """Return an entry, or None where there is none that can be read."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            facts = json.loads(str(stored["facts"]))
            columns = {name: stored[name] for name in COLUMNS}
        if len({len(values) for values in columns.values()}) != 1 or set(facts) != set(_FACTS):
            return None
        os.utime(path)  # the oldest ones are deleted first
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    counters = {name: Counter(facts[name]) for name in ("bad_reasons", "unused")}
    bad = [tuple(entry) for entry in facts["bad"]]
    return Scan(**facts | counters | {"bad": bad, "columns": columns})


def _key(digest: str, kind: str, reading: Reading) -> str:
    encoder, tokenizer = reading.encoder, reading.encoder.tokenizer
    parts = [
        _code(), digest, kind, hashlib.sha256(tokenizer.model_bytes).hexdigest(), tokenizer.family,
        sorted(tokenizer.special.items()), sorted(map(repr, tokenizer.added.values())),
        encoder.template, encoder.train_on_prompt, reading.max_length, reading.fmt,
        reading.preferred, None if encoder.texts is None else encoder.texts.stride,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@cache
def _code() -> str:
    """Return a hash of the code that an entry depends on."""
    digest = hashlib.sha256()
    for name in _CODE:
        digest.update(Path(str(sys.modules[name].__file__)).read_bytes())
    return digest.hexdigest()
