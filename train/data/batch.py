"""The arrays that one training step learns from."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class Batch:
    """Rows of one or several token sequences each.

    With gradient accumulation the arrays are [A, B, T]: A micro-batches of B rows.
    """

    tokens: Any  # int32 [B, T]
    segment_ids: Any  # int32 [B, T], 1, 2, ... for the sequences of a row, 0 for padding
    positions: Any  # int32 [B, T], from 0 in every sequence
    learned: Any  # bool [B, T], tokens whose prediction counts in the loss
