"""Names of dtypes, and the one that suits a device."""

import sys
from typing import Any

import jax
import numpy as np

from glm2_jax.choices import DTYPE_NAMES, DTYPES
from glm2_jax.errors import UsageError
from glm2_jax.runtime.host_memory import find_memory


def dtype_name(dtype: Any) -> str:
    """Return "float32", "bfloat16", "float16", ..."""
    return np.dtype(dtype).name


def resolve_dtype(name: str, *, num_params: int, device: Any = None) -> np.dtype:
    """Return the dtype that a name of `choices.DTYPES` means for `num_params` on a `jax.Device`.

    "auto" is bfloat16 on TPUs and on GPUs that have it, float16 on older GPUs, and on a CPU float32
    if it fits the free memory, else bfloat16. An unknown name is a UsageError.
    """
    if not isinstance(name, str) or name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", fix=f"Known: {', '.join(DTYPES)}.")
    if name != "auto":
        return np.dtype(DTYPE_NAMES[name])
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        fits = num_params * 4 * 1.1 < available_memory()
        return np.dtype("float32" if fits else "bfloat16")
    try:
        older = device.platform == "gpu" and float(device.compute_capability) < 8.0
    except (AttributeError, ValueError):  # AMD's is not a number
        older = False
    return np.dtype("float16" if older else "bfloat16")


def available_memory() -> int:
    """Return the bytes of host memory that a new program can use, within container limits."""
    return find_memory().usable or sys.maxsize
