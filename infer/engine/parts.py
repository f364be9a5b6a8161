"""Cuts prompts into parts of bounded size, which are read into the cache one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glm2_jax.runtime.buckets import bucket

ROOM = 256  # slots for the answer that a cache has at first


class Part(NamedTuple):
    """A part of every prompt, padded on the right."""

    tokens: np.ndarray  # int32 [B, T]
    lengths: np.ndarray  # int32 [B], how many of them count
    kept: np.ndarray  # int32 [B], tokens before them, which are in the cache


def parts(prompts: Sequence[Sequence[int]], kept: int, batch: int, longest: int) -> list[Part]:
    """Cut prompts into parts.

    All parts but the last are `longest` wide, the last is a bucket of at most that. Every prompt
    ends in the last part, where the first token of its answer is drawn; a short prompt is empty in
    those before.

    Args:
        kept: ids at the beginning of every prompt that are in the cache already.
        batch: B, rows of a part; those after the prompts are empty.
    """
    rows = [list(ids[kept:]) for ids in prompts]
    most = max(map(len, rows))
    count = (most - 1) // longest
    last = bucket(most - count * longest, longest)
    starts = np.zeros(batch, np.int32)
    starts[: len(rows)] = kept
    result = []
    for index in range(count + 1):
        width = longest if index < count else last
        tokens, lengths = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
        for row, ids in enumerate(rows):
            until = len(ids) if index == count else max(len(ids) - last, 0)
            ids = ids[starts[row] - kept : until][:width]
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        result.append(Part(tokens, lengths, starts.copy()))
        starts += lengths
    return result
