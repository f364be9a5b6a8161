"""Text that comes from outside: UTF-8, with or without a byte order mark, and nothing else.

A file in another encoding would turn into nonsense without a word, so it is refused with a guess at
what it is. Nothing here imports jax.
"""

import codecs
import os
import re
import stat
import sys
from collections.abc import Callable
from typing import BinaryIO

from glm2_jax.errors import InputError

STDIN = "standard input"
LARGEST = 256_000_000  # bytes of what should be one text, or comes from a device
_SAMPLE = 1 << 16  # bytes that are looked at to guess an encoding
_PIECE = 1 << 20

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_utf8(path: str | os.PathLike[str]) -> str:
    """Reads a text file, or standard input if the path is "-".

    Raises:
      InputError: the file is missing, a folder, unreadable, larger than LARGEST, or not UTF-8.
    """
    name = os.fspath(path)
    return decode_utf8(read_bytes(path, LARGEST), STDIN if name == "-" else name)


def read_bytes(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """Reads a file, or standard input if the path is "-"; InputError if that cannot be done.

    Args:
      limit: the most bytes that it may have; of a device never more than LARGEST, since it may
        have no end.
    """
    name = os.fspath(path)
    try:
        if name == "-":
            if sys.stdin is None:
                raise InputError("cannot read standard input", "it is closed")
            return _read(sys.stdin.buffer, STDIN, limit)
        with open(name, "rb") as file:
            return _read(file, name, limit)
    except FileNotFoundError:
        raise InputError(f"cannot read {name}", "there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"cannot read {name}", "it is a folder, not a file") from None
    except PermissionError:
        raise InputError(
            f"cannot read {name}", "permission denied", "make the file readable, e.g. chmod u+r"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the name
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {name}", reason) from None


def _read(file: BinaryIO, name: str, limit: int | None) -> bytes:
    if limit is None and _is_device(file):
        limit = LARGEST
    if limit is None:
        return file.read()
    parts, left = [], limit + 1  # piece by piece: the space for all of them is not taken at once
    while left and (not parts or len(parts[-1]) == _PIECE):
        parts.append(file.read(min(_PIECE, left)))
        left -= len(parts[-1])
    if not left:
        raise InputError(f"cannot read {name}", f"it has more than {limit // 10**6} MB")
    return b"".join(parts)


def _is_device(file: BinaryIO) -> bool:
    try:
        return stat.S_ISCHR(os.fstat(file.fileno()).st_mode)
    except (OSError, ValueError):  # not a file of the system
        return False


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
