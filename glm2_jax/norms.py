"""Norms and activations, as the families have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from glm2_jax.config import GLMConfig


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, rounded: bool = False) -> jax.Array:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32, rounded once.

    With `rounded` it is rounded before the weight, too. Sources: RMSNorm of the published
    modeling_chatglm.py; Glm4RMSNorm of transformers.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y.astype(x.dtype).astype(jnp.float32) if rounded else y
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Compute (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis, in float32,
    rounded once."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def norm(config: GLMConfig, weights: Mapping[str, Any], name: str, x: jax.Array) -> jax.Array:
    """Apply the norm of that name, as the family has it."""
    kind, eps = config.block.norm, config.norm_eps
    if kind == "layer":
        return layer_norm(x, weights[name], weights[f"{name}_bias"], eps)
    return rms_norm(x, weights[name], eps, rounded=kind == "rms_rounded")


def _swiglu(both: jax.Array) -> jax.Array:
    return jax.nn.silu(both[:, :, 0]) * both[:, :, 1]


# By `Block.mlp`: [B, T, C, F] -> [B, T, F], in float32.
ACTIVATIONS = {
    "swiglu": _swiglu,
    "gelu_tanh": lambda up: jax.nn.gelu(up[:, :, 0], approximate=True),
    "gelu": lambda up: jax.nn.gelu(up[:, :, 0], approximate=False),
}
