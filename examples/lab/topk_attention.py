"""Top-k sparse attention: each query reads the values of the k keys with the highest scores.

Source: Gupta et al., "Memory-efficient Transformers via Top-k Attention", 2021.

Buys: values of k keys for each query head; all keys are still read, so at most half of the cache.
Costs: finding the k largest scores, which is slow where a step waits for few bytes; the sum of what
the other keys had to say.
"""

import jax
import jax.numpy as jnp

from glm2_jax.attention import scaled_scores
from glm2_jax.ideas import Idea, tell


def idea(*, k: int = 8) -> Idea:
    def attention(usual, seen):
        (B, T, N, H), (K, S) = seen.q.shape, seen.k.shape[1:3]
        tell("group", N // K)  # query heads that share a key/value head
        q = seen.q.reshape(B, T, K, N // K, H)
        scores = scaled_scores(q, seen.k, seen.visible.mask(0, S))  # [B, K, G, T, S]
        top, slots = jax.lax.top_k(scores, min(k, S))
        values = jnp.take_along_axis(seen.v[:, :, None, None], slots[..., None], axis=-2)
        out = jnp.einsum("BKGTS,BKGTSH->BTKGH", jax.nn.softmax(top), values.astype(jnp.float32))
        return out.reshape(B, T, N, H).astype(seen.q.dtype)

    def reads(usual, told):
        return usual._replace(values=min(usual.values, k * told["group"]))

    return Idea(attention=attention, reads=reads)
