"""Grouped-query attention over a boolean mask."""

import jax
import jax.numpy as jnp

from glm2_jax.linear import einsum


def masked_probs(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) where the mask allows, computed in float32.

    Query heads are viewed as K groups of G = N / K, so keys are never repeated.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H].
        mask: bool [B, T, S]; True where the query may look. A query that may look nowhere gets
            equal weights, which keeps padding rows finite.

    Returns:
        float32 [B, K, G, T, S].
    """
    B, T, N, H = q.shape
    grouped = q.reshape(B, T, k.shape[2], N // k.shape[2], H)
    scores = einsum("BTKGH,BSKH->BKGTS", grouped, k) / jnp.sqrt(jnp.float32(H))
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def weighted_values(probs: jax.Array, v: jax.Array) -> jax.Array:
    """Sums values by probability: [B, K, G, T, S], [B, S, K, H] -> [B, T, N, H] in v's dtype."""
    B, K, G, T, _ = probs.shape
    out = einsum("BKGTS,BSKH->BTKGH", probs.astype(v.dtype), v).astype(v.dtype)
    return out.reshape(B, T, K * G, v.shape[-1])
