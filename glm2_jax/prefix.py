"""Prefixes of P-Tuning v2: trained keys and values of every layer, which each sequence begins with.

They have no position and are not rotated; the positions of real tokens begin at 0 behind them, and
every real token sees all of them. Axis letters as in `glm2_jax.model`, and P for the prefix.

Without a cache the layers put the prefix before the keys of each row; of packed rows every segment
sees it, as if it were alone. With a cache it lies in the first slots of each row: `KVCache.new`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class Prefix:
    """What a prefix encoder gives.

    Attributes:
        k: [L, P, K, H] keys.
        v: [L, P, K, H] values.
    """

    k: jax.Array
    v: jax.Array

    @property
    def length(self) -> int:
        """P."""
        return self.k.shape[1]


def with_prefix(params: Mapping[str, Any], prefix: Prefix) -> dict[str, Any]:
    """Params that bring their prefix along, for programs that take params alone. All other arrays
    are shared, not copied."""
    return {**params, "prefix": prefix}


def prefix_length(params: Mapping[str, Any]) -> int:
    """P of the params' prefix, 0 where they have none."""
    prefix = params.get("prefix")
    return 0 if prefix is None else prefix.length
