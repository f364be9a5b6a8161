"""What the backward pass of training recomputes of each layer, and what it keeps instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name as keep
from jax.ad_checkpoint import checkpoint_policies

__all__ = ["keep", "saving"]

# The values that a block gives these names with `keep`: queries, keys and values after rotation,
# the result of attention, and the products with the weights.
_ATTENTION = ("q", "k", "v", "attention", "o")
# What is kept besides the input of a layer, by the names of `choices.REMAT`.
_KEPT = {"products": (*_ATTENTION, "gate_up"), "attention": _ATTENTION, "full": ()}


def saving(layer: Any, policy: str | bool, wrap: Callable[..., Any] = jax.checkpoint) -> Any:
    """Return a layer's function whose backward pass recomputes what `policy` says, one of
    `choices.REMAT`, or True for full and False for none; `wrap` is `jax.checkpoint`, or Linen's
    for a function of modules."""
    if isinstance(policy, bool):
        policy = "full" if policy else "none"
    if policy == "none":
        return layer
    return wrap(layer, policy=checkpoint_policies.save_only_these_names(*_KEPT[policy]))
