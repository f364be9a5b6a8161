"""Reads text and JSON from outside, with limits: UTF-8, with or without a byte order mark.

Another encoding would silently become nonsense, so it is refused.
"""

import codecs
import contextlib
import errno
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, BinaryIO

from glm2_jax.cli.bundled import ROWS, find_bundled
from glm2_jax.cli.messages import human_size
from glm2_jax.errors import InputError, shorten

STDIN = "standard input"
LARGEST = 256_000_000  # bytes of what should be one text
MAX_LINE = 16 * 2**20  # bytes of a line that is one row; no model could read more of them
_SAMPLE = 1 << 16  # bytes that are looked at to recognize UTF-16 and UTF-32
_PIECE = 1 << 20
_MAX_DEPTH = 100  # of JSON

# The mark of little-endian UTF-32 begins with that of UTF-16.
_WIDE_MARKS = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE
CONVERT = "save it as UTF-8, or convert it, from GBK for example: iconv -f GB18030 -t UTF-8"
_REASONS = {errno.ENOENT: "file not found", errno.EISDIR: "it is a folder, not a file"}


class EndlessLine(InputError):
    """A line of a pipe or device has not ended after LARGEST bytes: nothing can follow it."""


def read_utf8(path: str | os.PathLike[str]) -> str:
    """Read a text file, or standard input if the path is "-"; InputError as `read_text`."""
    with open_input(path) as file:
        return read_text(file, STDIN if os.fspath(path) == "-" else os.fspath(path))


def read_text(file: BinaryIO, name: str) -> str:
    """Read the rest of an open file; InputError if it is larger than LARGEST, or not UTF-8."""
    size = _size(file) or 0
    # For a file of known size `read(LARGEST + 1)` would reserve that much memory.
    data = b"" if size > LARGEST else file.read() if size else file.read(LARGEST + 1)
    if max(size, len(data)) > LARGEST:
        has = human_size(size) if size else "more"
        why = f"it has {has}, and a text may have {human_size(LARGEST)}"
        raise InputError(f"cannot read {name}", why)
    return decode_utf8(data, name)


def read_lines(
    file: BinaryIO, name: str, seen: Callable[[bytes], object] = lambda data: None
) -> Iterator[tuple[int, bytes | InputError]]:
    """Yield the lines that are not blank: the number, from 1, and the line without its end, or the
    error of one that is longer than MAX_LINE.

    A byte order mark at the start is dropped; `seen` gets all that is read, piece by piece.
    InputError: the bytes are UTF-16 or UTF-32, or as EndlessLine, a line does not end.
    """
    refuse_wide(file.peek() if isinstance(file, io.BufferedReader) else b"", name)
    for number in count(1):
        try:
            line = read_line(file, f"{name}:{number}", seen)
        except EndlessLine:
            raise
        except InputError as error:
            yield number, InputError(error.why)
            continue
        if not line:
            return
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line.removesuffix(b"\n")


def read_line(
    file: BinaryIO, name: str, seen: Callable[[bytes], object] = lambda data: None
) -> bytes:
    """Return a line with its end, b"" after the last one; InputError if it is longer than MAX_LINE
    (then the next one can be read), EndlessLine if it has no end."""
    line = file.readline(MAX_LINE + 1)
    seen(line)
    size = len(line)
    if size <= MAX_LINE:
        return line
    what, limit = f"cannot read {name}", f"a line may have {human_size(MAX_LINE)}, this has"
    while not line.endswith(b"\n") and (line := file.readline(_PIECE)):
        seen(line)
        size += len(line)
        if size > LARGEST and _size(file) is None:
            why = f"{limit} {human_size(size)} so far"
            raise EndlessLine(what, why, "end each line with a newline")
    raise InputError(what, f"{limit} {human_size(size)}")


@contextlib.contextmanager
def open_input(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file to read, maybe a bundled one, or standard input, which stays open, if it is "-".

    InputError: it cannot be opened, or reading fails inside the block.
    """
    name = os.fspath(path)
    if "\0" in name:
        raise InputError(f"cannot read {name}", "its name holds a NUL character")
    if name == "-" and sys.stdin is None:
        raise InputError("cannot read standard input", "it is closed")
    try:
        if name == "-":
            yield sys.stdin.buffer
        else:
            with open(find_bundled(name, ROWS), "rb", buffering=_SAMPLE) as file:
                yield file
    except OSError as error:
        why = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise InputError(f"cannot read {name}", why) from None


def _size(file: BinaryIO) -> int | None:
    """Return the bytes of a regular file; None for a pipe, a device, or no file of the system."""
    try:
        status = os.fstat(file.fileno())
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def decode_utf8(data: bytes, name: str) -> str:
    """Decode UTF-8 without its byte order mark; InputError with the place of what is not UTF-8."""
    refuse_wide(data, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        why = f"line {line}, {bad_byte(error)}"
        raise InputError(f"{name} is not UTF-8 text", why, CONVERT) from None


def bad_byte(error: UnicodeDecodeError) -> str:
    """Return which byte of the text is not UTF-8."""
    return f"byte {error.start + 1} cannot be read"


def refuse_wide(data: bytes, name: str) -> None:
    """Raise InputError for UTF-16 and UTF-32, which cannot be split into lines as bytes."""
    # Without a mark: the ASCII part of UTF-16 has a NUL in each pair, always on the same side.
    sample = data[:_SAMPLE]
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    dense = even + odd > max(len(sample) // 4, 1) and max(even, odd) > 0.9 * (even + odd)
    if dense or data.startswith(_WIDE_MARKS):
        # One half of each character of UTF-32 is zero.
        halves = [sample[i::4].count(0) + sample[i + 1 :: 4].count(0) for i in (0, 2)]
        wide = "UTF-32" if max(halves) > len(sample) * 3 // 8 else "UTF-16"
        fix = f"save it as UTF-8, or convert it: iconv -f {wide} -t UTF-8"
        raise InputError(f"{name} is not UTF-8 text", f"it looks like {wide}", fix)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; InputError also for a key twice and for deep nesting."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        _check_depth(value)
        return value
    except RecursionError:
        raise InputError("cannot read this JSON", "it is nested too deeply") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text.strip() else ""
        raise InputError("not JSON", f"{error.msg}: {line}column {error.colno}") from None
    except ValueError as error:  # an immense number
        raise InputError("not JSON", str(error)) from None


def parse_line(line: bytes) -> Any:
    """Return the value of a line of JSON; InputError as `parse_json`, or if it is not UTF-8."""
    try:
        return parse_json(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8", bad_byte(error), CONVERT) from None


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; InputError as `parse_line`, or if it is not an object."""
    row = parse_line(line)
    if not isinstance(row, dict):
        raise InputError("not a JSON object", "write {...} with a value for each key")
    return row


def _check_depth(value: Any) -> None:
    """Raise RecursionError for a value so deep that writing it again could fail."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for key, value in pairs:
        if key in result:
            raise InputError(f"the key {shorten(key)} appears twice")
        result[key] = value
    return result
