"""How much a forward pass keeps for its backward pass, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Var


def residual_bytes(forward: Callable[..., Any], *args: Any) -> int:
    """Return the bytes of what a function keeps for the backward pass, besides its arguments.

    `forward` returns the second result of `jax.vjp`. It is traced and not computed, so `args` may
    be shapes.
    """
    traced = jax.make_jaxpr(forward)(*args).jaxpr
    kept = {x for x in traced.outvars if isinstance(x, Var)} - set(traced.invars)
    avals: list[Any] = [x.aval for x in kept]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)
