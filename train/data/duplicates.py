"""Rows that nearly repeat an earlier one, found by MinHash, and dialogues that rows repeat.

A text is the set of its 5-character pieces, after case, width, spaces and punctuation are removed.
For each of 64 hash functions the smallest value over this set is kept; the share of equal values
estimates the share of pieces that two texts have in common. Only texts that agree in all values of
some band of four are compared, each with the first such text (locality-sensitive hashing).
"""

from __future__ import annotations

import hashlib
import unicodedata
import zlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PIECE = 5  # characters
ALIKE = 0.8  # share of the pieces in common
_HASHES, _BAND = 64, 4
_bits = np.random.Philox(np.random.SeedSequence(5)).random_raw(2 * _HASHES)
_FACTORS, _TERMS = _bits[:_HASHES] | np.uint64(1), _bits[_HASHES:]


def normalized(text: str) -> str:
    """Return a text without case, width, spaces and punctuation."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in text if unicodedata.category(char)[0] not in "PZC")


def signature(text: str) -> np.ndarray:
    """Return uint32 [64]: the smallest value of each hash function over the pieces of a text."""
    return signature_of(normalized(text))


def signature_of(normal: str) -> np.ndarray:
    """Return the signature of a text that is normalized."""
    pieces = {normal[at : at + PIECE] for at in range(max(len(normal) - PIECE + 1, 1))}
    sums = np.array([zlib.crc32(piece.encode()) for piece in pieces], np.uint64)
    values = (sums[:, None] * _FACTORS + _TERMS) >> np.uint64(32)  # multiply-shift, modulo 2**64
    return values.min(axis=0).astype(np.uint32)


def repeats(signatures: np.ndarray) -> np.ndarray:
    """Return int64 [N] for uint32 [N, 64]: the first text that each one nearly repeats, or the text
    itself where no earlier one is nearly the same."""
    found = np.arange(len(signatures))
    for start in range(0, _HASHES, _BAND):
        band = signatures[:, start : start + _BAND]
        _, first, group = np.unique(band, axis=0, return_index=True, return_inverse=True)
        earlier = first[group.reshape(-1)]
        alike = (signatures == signatures[earlier]).mean(axis=1) >= ALIKE
        found = np.where(alike, np.minimum(found, earlier), found)
    return found


class Seen:
    """The signatures of texts so far, to ask for a nearly equal one; as `repeats` compares them."""

    def __init__(self):
        self._first: dict[tuple[int, bytes], np.ndarray] = {}

    def add(self, text: np.ndarray) -> None:
        """Add a signature, uint32 [64]."""
        for key in self._keys(text):
            self._first.setdefault(key, text)

    def has(self, text: np.ndarray) -> bool:
        """Return whether an earlier text is nearly the same."""
        found = (self._first.get(key) for key in self._keys(text))
        return any(x is not None and (x == text).mean() >= ALIKE for x in found)

    def _keys(self, text: np.ndarray) -> list[tuple[int, bytes]]:
        starts = range(0, _HASHES, _BAND)
        return [(start, text[start : start + _BAND].tobytes()) for start in starts]


class Dialogues:
    """Finds conversations that are the beginning of another one: logs often repeat in each row the
    dialogue so far. Only a hash of each round is kept."""

    def __init__(self):
        self._complete = array("Q")  # the hash of each conversation
        self._sums, self._of = array("Q"), array("q")  # of proper beginnings, and their number

    def add(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Add the next conversation, which ends with an answer."""
        digest = hashlib.blake2b(digest_size=8)
        for left, message in enumerate(messages, 1 - len(messages)):
            digest.update(f"{message['role']}\0{message['content']}\0".encode("utf-8", "replace"))
            total = int.from_bytes(digest.digest(), "little")
            if not left:
                self._complete.append(total)
            elif message["role"] == "assistant":
                self._sums.append(total)
                self._of.append(len(self._complete))

    def growing(self) -> list[tuple[int, int]]:
        """Return pairs: the number of a conversation, and of one that begins with all of it."""
        complete = np.array(self._complete)
        sums, first = np.unique(np.array(self._sums, np.uint64), return_index=True)
        places = np.searchsorted(sums, complete)
        found = np.flatnonzero(np.isin(complete, sums))
        return [(int(number), self._of[first[places[number]]]) for number in found]
