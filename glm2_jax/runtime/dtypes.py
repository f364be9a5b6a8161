"""Names of number types, and the one that suits a device."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax.errors import UsageError
from glm2_jax.runtime.host_memory import find_memory

_DTYPES = {
    "float32": jnp.float32,
    "fp32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "bf16": jnp.bfloat16,
    "float16": jnp.float16,
    "fp16": jnp.float16,
    "half": jnp.float16,
}
DTYPE_NAMES = ("auto", *_DTYPES)


def dtype_name(dtype: Any) -> str:
    """ "float32", "bfloat16", "float16", ..."""
    return np.dtype(dtype).name


def resolve_dtype(name: str, *, num_params: int, device: Any = None) -> np.dtype:
    """The dtype that a name means on a device.

    Args:
        name: one of `DTYPE_NAMES`. "auto" is bfloat16 on TPUs and on GPUs that have it, float16 on
            older GPUs, and on a CPU float32 where it fits the free memory, else bfloat16.
        num_params: number of parameters, to see what fits.
        device: a `jax.Device`; default: the first one.

    Raises:
        UsageError: an unknown name.
    """
    if not isinstance(name, str) or name not in DTYPE_NAMES:
        raise UsageError(f"Unknown dtype {name!r}.", f"Known names: {', '.join(DTYPE_NAMES)}.")
    if name != "auto":
        return np.dtype(_DTYPES[name])
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        fits = num_params * 4 * 1.1 < available_memory()
        return np.dtype(jnp.float32 if fits else jnp.bfloat16)
    if device.platform == "gpu" and _compute_capability(device) < 8.0:
        return np.dtype(jnp.float16)
    return np.dtype(jnp.bfloat16)


def available_memory() -> int:
    """Bytes of host memory that a new program can use, limits of containers taken into account."""
    return find_memory().usable or sys.maxsize


def _compute_capability(device: Any) -> float:
    """NVIDIA's compute capability; infinity for devices that name something else (AMD)."""
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):
        return float("inf")
