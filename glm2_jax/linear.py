"""The one product of activations and weights that every layer uses."""

import jax
import jax.numpy as jnp


def einsum(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays, accumulated and returned in float32.

    Float32 operands are multiplied as float32 on every platform: GPUs would otherwise round them
    to TF32 and TPUs to bfloat16.

    Args:
        spec: einsum over the axis letters of `glm2_jax.model`.
        x: activations.
        w: weights or keys/values, in the dtype of `x`.

    Returns:
        float32 array.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, w, precision=precision, preferred_element_type=jnp.float32)
