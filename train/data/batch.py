"""What one step learns from."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class Batch:
    """Rows that hold token sequences, one or several in each.

    A step that accumulates gradients takes arrays [A, B, T]: A times as many rows, B at once.

    Attributes:
        tokens: int32 [B, T].
        segment_ids: int32 [B, T], 1, 2, ... for the sequences of a row, 0 for padding.
        positions: int32 [B, T], from 0 in every sequence.
        learned: bool [B, T], tokens whose prediction counts in the loss.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    learned: Any
