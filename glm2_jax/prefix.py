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
import jax.numpy as jnp


@flax.struct.dataclass
class Prefix:
    """The output of a prefix encoder, for P prefix tokens."""

    k: jax.Array  # [L, P, K, H]
    v: jax.Array  # [L, P, K, H]
    # Rate at which its elements are dropped, differently in each row, if a dropout key is given.
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def length(self) -> int:
        """P, the number of its keys."""
        return self.k.shape[1]


def of_layer(
    prefix: Prefix, layer: jax.Array | int, rows: int, dtype: Any, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return one layer's keys and values of a prefix for the rows of a batch, [rows, P, K, H] in a
    dtype; a `key` drops elements of them."""
    both = []
    for number, array in enumerate((prefix.k, prefix.v)):
        x = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False).astype(dtype)
        x = jnp.broadcast_to(x, (rows, *x.shape))
        if key is not None and prefix.dropout > 0:
            share = 1 - prefix.dropout
            kept = jax.random.bernoulli(jax.random.fold_in(key, number), share, x.shape)
            x = jnp.where(kept, x / jnp.asarray(share, dtype), 0)
        both.append(x)
    return both[0], both[1]


def with_prefix(params: Mapping[str, Any], prefix: Prefix) -> dict[str, Any]:
    """Return the params with a prefix inside, for programs that take only params."""
    return {**params, "prefix": prefix}


def prefix_length(params: Mapping[str, Any]) -> int:
    """Return the length of the params' prefix, 0 if they have none."""
    return params["prefix"].length if "prefix" in params else 0
