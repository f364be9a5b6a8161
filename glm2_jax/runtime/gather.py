"""Brings arrays back to the host, one at a time, wherever their shards are."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gathered(array: Any, layer: int | None = None) -> np.ndarray:
    """Return an array, or one layer of a stacked one, complete on the host.

    If shards of it are on devices of other processes, all processes must call this for the same
    arrays in the same order; each gets the complete array.
    """
    if isinstance(array, jax.Array) and array.is_fully_replicated:
        array = array.addressable_data(0)
        if array.devices().pop().platform == "cpu":
            array = np.asarray(array)  # a view, and so is a layer of it
    part = array if layer is None else array[layer]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        return multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)
