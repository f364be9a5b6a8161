"""P-Tuning v2 prefixes: trained keys and values of every layer that each sequence begins with.

They have no position and are not rotated; the positions of real tokens begin at 0 after them, and
every token sees all of them. Without a cache the layers put the prefix before the keys of each row,
and every segment of a packed row sees it. With a cache it is in the first slots of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class Prefix:
    """The output of a prefix encoder, for P prefix tokens."""

    k: jax.Array  # [L, P, K, H]
    v: jax.Array  # [L, P, K, H]

    @property
    def length(self) -> int:
        """P, the number of its keys."""
        return self.k.shape[1]


def with_prefix(params: Mapping[str, Any], prefix: Prefix) -> dict[str, Any]:
    """Return the params with a prefix inside, for programs that take only params."""
    return {**params, "prefix": prefix}


def prefix_length(params: Mapping[str, Any]) -> int:
    """Return the length of the params' prefix, 0 if they have none."""
    return params["prefix"].length if "prefix" in params else 0
