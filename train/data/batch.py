"""The arrays that one training step learns from."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import numpy as np


@flax.struct.dataclass
class Batch:
    """Rows of one or several token sequences each.

    With gradient accumulation the arrays are [A, B, T]: A micro-batches of B rows.
    """

    tokens: Any  # int32 [B, T]
    segment_ids: Any  # int32 [B, T], 1, 2, ... for the sequences of a row, 0 for padding
    positions: Any  # int32 [B, T], from 0 in every sequence
    learned: Any  # bool [B, T], tokens whose prediction counts in the loss


def make_batch(rows: Sequence[Sequence[tuple[list[int], list[bool]]]], width: int) -> Batch:
    """Return the batch [B, width] of rows of sequences, each its tokens and which are learned."""
    tokens, segment_ids, positions = np.zeros((3, len(rows), width), np.int32)
    learned = np.zeros((len(rows), width), bool)
    for number, row in enumerate(rows):
        start = 0
        for segment, (ids, mask) in enumerate(row, 1):
            place = slice(start, start := start + len(ids))
            tokens[number, place] = ids
            segment_ids[number, place] = segment
            positions[number, place] = np.arange(len(ids))
            learned[number, place] = mask
    return Batch(tokens, segment_ids, positions, learned)
