"""Rotary position embedding of the first dimensions of each head: pairs (2i, 2i + 1)."""

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax.config import GLMConfig

# Exponent and mantissa bits, for jax.lax.reduce_precision.
_FLOAT_BITS = {"float16": (5, 10), "bfloat16": (8, 7)}


def rope_tables(config: GLMConfig, positions: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine of the angles of each token, float32 [B, T, A] each.

    A head has one section, which is rotated by the positions [B, T], or two, by the positions and
    block positions [B, 2, T]. In a section of R dimensions theta_i = base^(-2i / R), angle =
    position * theta_i; A is half of all rotated dimensions. With `rope_table_dtype="reference"`
    they are rounded as in the published code: ChatGLM-6B and ChatGLM2 compute theta, positions and
    their product in the model's `dtype`, ChatGLM3 rounds only the finished cosine and sine.
    (Source: modeling_chatglm.py of the three.)
    """
    name = jnp.dtype(dtype).name
    rounded = config.rope_table_dtype == "reference" and name in _FLOAT_BITS
    in_model_dtype = rounded and config.block.half_angles

    def to_model_dtype(x: jax.Array) -> jax.Array:
        # The compiler may drop a cast there and back as excess precision.
        return jax.lax.reduce_precision(x, *_FLOAT_BITS[name])

    theta = jnp.asarray(_theta(config, dtype if in_model_dtype else np.float32))
    position = positions.astype(jnp.float32)
    if in_model_dtype:
        position = to_model_dtype(position)
    if config.rope_kind == "linear" and config.rope_ratio != 1.0:
        position = position / config.rope_ratio
        if in_model_dtype:
            position = to_model_dtype(position)
    angle = position[..., None] * theta
    if in_model_dtype:
        # The float32 product of two half-precision numbers is exact: this rounds once.
        angle = to_model_dtype(angle)
    if config.block.rotary == "both":
        angle = jnp.concatenate([angle[:, 0], angle[:, 1]], axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (to_model_dtype(cos), to_model_dtype(sin)) if rounded else (cos, sin)


def _theta(config: GLMConfig, dtype) -> np.ndarray:
    """Return the frequencies of a section, computed step by step in `dtype`, as float32."""
    dtype, block = np.dtype(dtype), config.block
    if block.rotary_dtype != "float32":  # whatever the dtype, computed in float32 and rounded once
        dtype = np.dtype(np.float32)
    rotated = config.head_dim if block.rotary == "full" else config.head_dim // 2
    base = config.rope_base * (config.rope_ratio if config.rope_kind == "base" else 1.0)
    exponent = np.arange(0, rotated, 2).astype(dtype) / np.asarray(rotated, dtype)
    # The power itself in float64, so that the result is correctly rounded on every platform:
    # one unit in the last place of theta is 1e-3 in the angle at position 32767.
    base = np.asarray(base, dtype).astype(np.float64)
    power = np.power(base, exponent.astype(np.float64)).astype(dtype)
    theta = np.asarray(1, dtype) / power
    return theta.astype(block.rotary_dtype).astype(np.float32)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first 2 A dimensions of the heads of [B, T, heads, H], in float32.

    The result has the dtype of `x`; `cos` and `sin` are float32 [B, T, A].
    """
    rotated = 2 * cos.shape[-1]
    pairs = x[..., :rotated].astype(jnp.float32).reshape(*x.shape[:-1], rotated // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    turned = turned.reshape(*x.shape[:-1], rotated).astype(x.dtype)
    return jnp.concatenate([turned, x[..., rotated:]], axis=-1)
