"""Rows that nearly repeat an earlier one, found by MinHash.

A text is the set of its 5-character pieces, after case, width, spaces and punctuation are gone. Of
the set, 64 hash functions each keep the smallest value; the share of them in which two texts agree
estimates the share of pieces that they have in common. Only texts that agree in all of some four
are compared, each with the first such one (locality-sensitive hashing).
"""

from __future__ import annotations

import unicodedata
import zlib

import numpy as np

PIECE = 5  # characters
ALIKE = 0.8  # of the pieces in common
_HASHES, _BAND = 64, 4


def signature(text: str) -> np.ndarray:
    """uint32 [64]: the smallest value of each hash function over the pieces of a text."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    normal = "".join(char for char in normal if unicodedata.category(char)[0] not in "PZC")
    pieces = {normal[at : at + PIECE] for at in range(max(len(normal) - PIECE + 1, 1))}
    sums = np.array([zlib.crc32(piece.encode()) for piece in pieces], np.uint64)
    values = (sums[:, None] * _FACTORS + _TERMS) >> np.uint64(32)  # multiply-shift, modulo 2**64
    return values.min(axis=0).astype(np.uint32)


def repeats(signatures: np.ndarray) -> np.ndarray:
    """For each text the first one that it nearly repeats.

    Args:
        signatures: uint32 [N, 64].

    Returns:
        int64 [N]: an earlier text, or the text itself where none is nearly the same.
    """
    found = np.arange(len(signatures))
    for start in range(0, _HASHES, _BAND):
        band = signatures[:, start : start + _BAND]
        _, first, group = np.unique(band, axis=0, return_index=True, return_inverse=True)
        earlier = first[group.reshape(-1)]
        alike = (signatures == signatures[earlier]).mean(axis=1) >= ALIKE
        found = np.where(alike, np.minimum(found, earlier), found)
    return found


_bits = np.random.Philox(np.random.SeedSequence(5)).random_raw(2 * _HASHES)
_FACTORS, _TERMS = _bits[:_HASHES] | np.uint64(1), _bits[_HASHES:]
