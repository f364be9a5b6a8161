"""What the model needs of XLA's compilers, per platform."""

from typing import Any

import jax.numpy as jnp


def compiler_options(platform: str) -> dict[str, str]:
    """Return options for `jax.jit(..., compiler_options=...)` of programs that scan the blocks.

    XLA:CPU of jax 0.10 hoists a float32 copy of all stacked half-precision weights out of the scan:
    23 to 25 GB for a 6B model in bfloat16. Without the two hoisting passes it converts one layer
    at a time. It vectorizes loops for 256 bits even if there are registers of 512.
    """
    if platform != "cpu":
        return {}
    passes = "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
    return {"xla_disable_hlo_passes": passes, "xla_cpu_prefer_vector_width": "512"}


def cache_dtype(platform: str, dtype: Any, kv: str = "auto") -> Any:
    """Return the dtype of a cache for a model that computes in `dtype`; `kv` is of `choices.KV`.

    Floats are float32 on a CPU: XLA:CPU of jax 0.10 writes a token into a half-precision cache by
    converting the complete cache to float32 and back, in every layer. It writes integers in place.
    """
    if kv == "int8":
        return jnp.int8
    return jnp.float32 if platform == "cpu" else dtype
