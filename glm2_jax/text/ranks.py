"""The byte-level vocabulary of GLM-4: tokens are bytes, and their ids the ranks of their merges.

A text is cut into words and signs first, then each part is merged from its bytes: always the
adjacent pair whose joined bytes have the lowest rank, the leftmost of equal ones.
"""

import base64
import binascii
import functools
import heapq
import json
import re
import unicodedata
from collections.abc import Set
from typing import Any

from glm2_jax.errors import CheckpointError, shorten

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})")
_DOWNLOAD = "Download the file from the repository that the weights come from."
_CACHED_PARTS, _CACHED_LENGTH = 2**15, 64  # parts, and characters of the longest one kept

# The pattern by which texts are cut is that of OpenAI's cl100k vocabulary:
#   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}
#   | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
# Python's `re` has no \p, so it runs over one sign a character instead: a letter of a contraction
# (itself), another letter (A), a number (9), a newline (\n), a space, other white space (\t),
# an apostrophe, and anything else (.).
_PARTS = re.compile(
    r"'(?:[stmd]|re|ve|ll)|[ \t.']?[A-Za-z]+|9{1,3}"
    r"| ?[.']+\n*|[ \t\n]*\n+|[ \t\n]+(?![^ \t\n])|[ \t\n]+"
)
_WHITE_SPACE = frozenset(  # Unicode's White_Space, which is not str.isspace
    [*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)]
    + [0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
)


class _Signs(dict[int, str]):
    """The sign of each character, by its number, for `str.translate`."""

    def __missing__(self, number: int) -> str:
        kind = unicodedata.category(chr(number))[0]
        sign = "A" if kind == "L" else "9" if kind == "N" else "."
        self[number] = "\t" if number in _WHITE_SPACE else sign
        return self[number]


_SIGNS = _Signs({ord(x): x.lower() for x in "stremvldSTREMVLD"})
# U+017F, the long s, is an s whose case is ignored.
_SIGNS.update({0x17F: "s", 0x0A: "\n", 0x0D: "\n", 0x20: " ", 0x27: "'"})


def _byte_letters() -> list[str]:
    """Return the letter by which GPT-2's files write each byte: itself if it is printable."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()
_LETTER_BYTES = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}


class Ranks:
    """The `Vocabulary` of a rank file, whose lines are "base64(bytes of a token) rank"."""

    families: tuple[str, ...] = ("glm4", "glm4-0414")
    description = "a file of ranked bytes"
    byte_level = True
    adds_dummy_prefix = drops_all_spaces = False
    decode_errors = "replace"

    def __init__(self, data: bytes, name: str):
        """Parse a rank file, called `name` in errors; CheckpointError if it is not a sound one."""
        self.model_bytes = data
        self._ranks = _read_ranks(data, name)
        self.size = len(self._ranks)
        self._tokens = sorted(self._ranks, key=self._ranks.__getitem__)
        self._cached = functools.lru_cache(_CACHED_PARTS)(self._encode_part)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for match in _PARTS.finditer(text.translate(_SIGNS)):
            part = text[match.start() : match.end()]
            ids += (self._cached if len(part) <= _CACHED_LENGTH else self._encode_part)(part)
        return ids

    def merges(self) -> list[tuple[str, str]]:
        """Return the two pieces of every token that is merged from others, lowest rank first.

        It is the `merges` table of tokenizer.json and GGUF. A token that no merging reaches is not
        in it: it is only found as a complete part (`ignore_merges` in tokenizer.json).
        """
        pairs = []
        for rank, token in enumerate(self._tokens):
            parts = self._merge(token, below=rank)
            if len(parts) == 2:  # a single byte is one
                pairs.append((self.piece(parts[0]), self.piece(parts[1])))
        return pairs

    def _encode_part(self, part: str) -> list[int]:
        data = part.encode()
        return [self._ranks[data]] if data in self._ranks else self._merge(data, below=self.size)

    def _merge(self, data: bytes, below: int) -> list[int]:
        """Merge n bytes to tokens of a rank below a limit, in O(n log n) steps."""
        size, ranks = len(data), self._ranks
        ends = [*range(1, size + 1), 0]  # of the token that starts here; 0 = none does
        before = list(range(-1, size))  # where the token to the left starts
        pairs: list[tuple[int, int, int]] = []  # rank, start, end of two adjacent tokens

        def add(start: int, end: int) -> None:
            rank = ranks.get(data[start:end], below)
            if rank < below:
                heapq.heappush(pairs, (rank, start, end))

        for start in range(size - 1):
            add(start, start + 2)
        while pairs:
            _, start, end = heapq.heappop(pairs)
            middle = ends[start]
            if not middle or ends[middle] != end:
                continue  # one of the two was merged with another token
            ends[start], ends[middle], before[end] = end, 0, start
            if start:
                add(before[start], end)
            if end < size:
                add(start, ends[end])
        ids, start = [], 0
        while start < size:
            ids.append(ranks[data[start : ends[start]]])
            start = ends[start]
        return ids

    def spell(self, token_id: int, avoid: Set[int]) -> list[int]:
        """Return the token's single bytes; one that is to be avoided is left out."""
        ids = (self._ranks[bytes([byte])] for byte in self._tokens[token_id])
        return [i for i in ids if i not in avoid]

    def piece(self, token_id: int) -> str:
        """Return a token's bytes in the letters of GPT-2, as tokenizer.json writes them."""
        data = self.raw_bytes(token_id)
        return "" if data is None else "".join(BYTE_LETTERS[byte] for byte in data)

    def piece_id(self, text: str) -> int | None:
        if not _LETTER_BYTES.keys() >= set(text):
            return None
        return self._ranks.get(bytes(_LETTER_BYTES[letter] for letter in text))

    def token_text(self, token_id: int) -> str:
        try:
            return (self.raw_bytes(token_id) or b"").decode()
        except UnicodeDecodeError:
            return ""

    def raw_bytes(self, token_id: int) -> bytes | None:
        return self._tokens[token_id] if 0 <= token_id < self.size else None


def is_rank_file(data: bytes) -> bool:
    """Return whether one of the first lines is that of a rank file."""
    return any(_LINE.fullmatch(line) for line in data[:4096].splitlines()[:16])


def _read_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Return token -> rank; ranks are 0, 1, 2, ... and every single byte is a token."""
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}  # of each rank
    content = data.splitlines()

    def refuse(number: int, why: str) -> CheckpointError:
        if number == len(content) and not data.endswith(b"\n"):
            why = f"The file is cut off in this line, so that the vocabulary is incomplete. {why}"
        what = f"Line {number} of {name[:1].lower()}{name[1:]} is not valid."
        return CheckpointError(what, why, _DOWNLOAD)

    for number, line in enumerate(content, 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            shown = shorten(line.decode("utf-8", "replace"))
            raise refuse(number, f"Expected a token in base64, a space and its rank, got {shown}.")
        try:
            token = binascii.a2b_base64(match[1], strict_mode=True)
        except binascii.Error as error:
            why = f"{shorten(match[1].decode())} is not base64 ({error})."
            raise refuse(number, why) from error
        rank = int(match[2])
        if token in ranks:
            raise refuse(number, f"Its token is also that of line {lines[ranks[token]]}.")
        if rank in lines:
            raise refuse(number, f"Its rank {rank} is also that of line {lines[rank]}.")
        ranks[token], lines[rank] = rank, number
    gap = next((rank for rank in range(len(ranks)) if rank not in lines), None)
    absent = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if gap is not None or absent is not None:
        why = f"Rank {gap} is missing." if gap is not None else f"Byte 0x{absent:02X} has no token."
        raise CheckpointError(f"{name} is not complete.", why, _DOWNLOAD)
    return ranks


def ranks_from_json(data: bytes, source: str = "tokenizer.json") -> bytes:
    """Return the rank file of a `tokenizer.json`: its byte-level model.vocab, whose ids are ranks.

    The merges of the file follow from the ranks and are not read; nor are its added tokens.
    CheckpointError if it has no such table. The result is not checked further: open it.
    """

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{source} has no byte-level vocabulary.", why, _DOWNLOAD)

    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refuse(f"It is not JSON ({shorten(str(error))}).") from error
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise refuse("Its model.vocab is not a table of tokens.")
    tokens: dict[int, str] = {}  # by their ranks
    for token, rank in vocabulary.items():
        if type(rank) is not int or not 0 <= rank < 10**9:
            raise refuse(f"The id of {shorten(token)} is {shorten(rank)}.")
        if not token or not _LETTER_BYTES.keys() >= set(token):
            raise refuse(f"The token {shorten(token)} is not written in GPT-2's byte letters.")
        if (other := tokens.setdefault(rank, token)) != token:
            raise refuse(f"The id of {shorten(token)} is {rank}, as that of {shorten(other)}.")
    lines = []
    for rank, token in sorted(tokens.items()):
        data = bytes(_LETTER_BYTES[letter] for letter in token)
        lines.append(b"%s %d\n" % (base64.b64encode(data), rank))
    return b"".join(lines)
