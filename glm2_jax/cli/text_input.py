"""Text that comes from outside: UTF-8, with or without a byte order mark, and nothing else.

A file in another encoding would turn into nonsense without a word, so it is refused with a guess at
what it is. Nothing here imports jax.
"""

import codecs
import contextlib
import io
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from itertools import count
from typing import BinaryIO

from glm2_jax.cli.messages import human_size
from glm2_jax.errors import InputError

STDIN = "standard input"
LARGEST = 256_000_000  # bytes of what should be one text
MAX_LINE = 16 * 2**20  # bytes of a line that is one row; no model could read more of them
_SAMPLE = 1 << 16  # bytes that are looked at to guess an encoding
_PIECE = 1 << 20

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class EndlessLine(InputError):
    """A line of a pipe or device that has not ended after LARGEST bytes: nothing can follow it."""


def read_utf8(path: str | os.PathLike[str]) -> str:
    """Reads a text file, or standard input if the path is "-".

    Raises:
      InputError: the file is missing, a folder, unreadable, larger than LARGEST, or not UTF-8.
    """
    with open_input(path) as file:
        return read_text(file, STDIN if os.fspath(path) == "-" else os.fspath(path))


def read_text(file: BinaryIO, name: str) -> str:
    """Reads the rest of an open file; InputError if it is larger than LARGEST, or not UTF-8."""
    size = os.fstat(file.fileno()).st_size if _mode(file, stat.S_ISREG) else 0
    parts, left = [], LARGEST + 1  # piece by piece: the space for all of them is not taken at once
    while size <= LARGEST and left and (piece := file.read(min(_PIECE, left))):
        parts.append(piece)
        left -= len(piece)
    if size > LARGEST or not left:
        has = human_size(size) if size else "more"
        why = f"it has {has}, and a text may have {human_size(LARGEST)}"
        raise InputError(f"cannot read {name}", why)
    return decode_utf8(b"".join(parts), name)


def read_lines(
    file: BinaryIO, name: str, seen: Callable[[bytes], object] = lambda data: None
) -> Iterator[tuple[int, bytes | InputError]]:
    """Reads the lines of an open file, one at a time; a byte order mark at its start is dropped.

    Args:
      file: as `open_input` gives it.
      name: where it comes from, for the errors.
      seen: is given all that is read, piece by piece.

    Yields:
      The number of each line that is not blank, from 1, and the line without its end, or what is
      wrong with one that is longer than MAX_LINE.

    Raises:
      InputError: the bytes are UTF-16 or UTF-32, or are more than LARGEST and come from a device.
      EndlessLine: what it says.
    """
    refuse_wide(_peek(file), name)
    left = LARGEST if _mode(file, stat.S_ISCHR) else math.inf
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
        left -= len(line)
        if left < 0:
            raise InputError(f"cannot read {name}", f"it has more than {human_size(LARGEST)}")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line.removesuffix(b"\n")


def read_line(
    file: BinaryIO, name: str, seen: Callable[[bytes], object] = lambda data: None
) -> bytes:
    """Reads a line with its end; b"" where there is no more.

    Raises:
      InputError: it is longer than MAX_LINE; the next one can be read. EndlessLine: no more can.
    """
    line = file.readline(MAX_LINE + 1)
    seen(line)
    size = len(line)
    if size <= MAX_LINE:
        return line
    endless = _mode(file, stat.S_ISFIFO, stat.S_ISSOCK, stat.S_ISCHR)
    while not line.endswith(b"\n") and (line := file.readline(_PIECE)):
        seen(line)
        size += len(line)
        if endless and size > LARGEST:
            why = f"a line may have {human_size(MAX_LINE)}, this has {human_size(size)} so far"
            raise EndlessLine(f"cannot read {name}", why, "end each line with a newline")
    why = f"a line may have {human_size(MAX_LINE)}, this has {human_size(size)}"
    raise InputError(f"cannot read {name}", why)


def _peek(file: BinaryIO) -> bytes:
    """The next bytes of an open file, as many as it has at hand; they stay to be read."""
    return file.peek() if isinstance(file, io.BufferedReader) else b""


@contextlib.contextmanager
def open_input(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file to read, or standard input if the path is "-", which stays open.

    Raises:
      InputError: it cannot be opened, or not be read inside the block.
    """
    name = os.fspath(path)
    try:
        if name == "-":
            if sys.stdin is None:
                raise InputError("cannot read standard input", "it is closed")
            yield sys.stdin.buffer
            return
        with _open(name) as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"cannot read {name}", "there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"cannot read {name}", "it is a folder, not a file") from None
    except PermissionError:
        raise InputError(
            f"cannot read {name}", "permission denied", "make the file readable, e.g. chmod u+r"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {name}", error.strerror or str(error)) from None


def _open(name: str) -> BinaryIO:
    try:
        return open(name, "rb", buffering=_SAMPLE)
    except ValueError as error:  # a NUL inside the name
        raise InputError(f"cannot read {name}", str(error)) from None


def _mode(file: BinaryIO, *kinds: Callable[[int], bool]) -> bool:
    """Whether an open file is of one of the kinds, each a test of `stat`."""
    try:
        mode = os.fstat(file.fileno()).st_mode
    except (OSError, ValueError):  # not a file of the system
        return False
    return any(kind(mode) for kind in kinds)


def decode_utf8(data: bytes, name: str) -> str:
    """Decodes UTF-8; a byte order mark at the start is dropped.

    Args:
      data: the bytes.
      name: where they come from, for the error.

    Raises:
      InputError: the bytes are not UTF-8; it says where, and what they look like.
    """
    refuse_wide(data, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name} is not UTF-8 text",
            f"line {line}, byte {error.start + 1} cannot be read; it looks like "
            f"{guess_encoding(data)}",
            "save it as UTF-8, or convert it: iconv -f ENCODING -t UTF-8",
        ) from None


def refuse_wide(data: bytes, name: str) -> None:
    """Raises InputError for UTF-16 and UTF-32, which cannot be split into lines as bytes."""
    kind = _wide_kind(data)
    if kind is not None:
        raise InputError(
            f"{name} is not UTF-8 text",
            f"it looks like {kind}",
            "save it as UTF-8, or convert it: iconv -f ENCODING -t UTF-8",
        )


def guess_encoding(data: bytes) -> str:
    """Names the likeliest encoding of bytes that are not UTF-8, e.g. "GB18030 (or GBK)"."""
    wide = _wide_kind(data)
    if wide is not None:
        return wide
    sample = data[:_SAMPLE]
    scores = {name: score(sample) for name, score in _SCORES.items()}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= 0.5 else "no text encoding that is known here"


def _wide_kind(data: bytes) -> str | None:
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    sample = data[:_SAMPLE]
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    # In UTF-16 the ASCII part has a NUL in each pair, on the same side. A few may also be in text.
    if even + odd < 2 or max(even, odd) <= 0.9 * (even + odd):
        return None
    dense = even + odd > len(sample) // 4
    return "UTF-16" if dense or (even + odd > len(sample) // 50 and not _is_utf8(sample)) else None


def _is_utf8(sample: bytes) -> bool:
    try:  # incremental, because the sample may end inside a character
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return False
    return True


def _multibyte_score(codec: str, is_common: Callable[[bytes], bool]) -> Callable[[bytes], float]:
    """Scores how many of the characters beyond ASCII are everyday ones in that encoding."""

    def score(sample: bytes) -> float:
        decoder = codecs.getincrementaldecoder(codec)()
        try:  # incremental, because the sample may end inside a character
            text = decoder.decode(sample)
        except UnicodeDecodeError:
            return 0.0
        wide = [char for char in text if char > "\x7f"]
        common = 0
        for char in wide:
            try:
                common += is_common(char.encode(codec))
            except UnicodeEncodeError:
                continue
        return common / len(wide) if wide else 0.0

    return score


def _latin_score(sample: bytes) -> float:
    """Scores how many of the bytes beyond ASCII are letters, at most two of them in a row."""
    runs = re.findall(rb"[\x80-\xff]+", sample)
    letters = sum(len(run) for run in runs if len(run) <= 2 and min(run) >= 0xA0)
    return letters / sum(map(len, runs)) if runs else 0.0


# The everyday characters stand together in each of the East Asian standards: GB 2312 level 1, the
# frequent part of Big5, kana and JIS level 1; with the punctuation before them.
_SCORES: dict[str, Callable[[bytes], float]] = {
    "GB18030 (or GBK)": _multibyte_score(
        "gb18030",
        lambda c: len(c) == 2 and c[1] >= 0xA1 and c[0] in (*range(0xB0, 0xD8), 0xA1, 0xA3),
    ),
    "Big5": _multibyte_score("big5", lambda c: len(c) == 2 and 0xA1 <= c[0] <= 0xC6),
    "Shift-JIS": _multibyte_score("cp932", lambda c: len(c) == 2 and 0x81 <= c[0] <= 0x97),
    "Latin-1 (or Windows-1252)": _latin_score,
}
