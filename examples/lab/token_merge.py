"""Token merging: two neighbours whose keys are alike become one, which counts twice.

The tokens 2i and 2i + 1 are merged in a head if the cosine between their keys exceeds the
threshold: queries after them see the mean of the keys and of the values, with log 2 added to the
score. Source: Bolya et al., "Token Merging: Your ViT But Faster", 2022. There the activations are
merged between layers, which also shortens the pass over the prompt; a causal model has to give a
logit for every token, so here keys and values alone are merged.

Buys, in principle: a cache, and reads, that are shorter by half of the merged tokens. Costs: what
the two had of their own. The program here makes both forms of each pair and masks one.
"""

import jax.numpy as jnp

from glm2_jax.attention import attend_where
from glm2_jax.ideas import Idea, tell


def idea(*, threshold: float = 0.9) -> Idea:
    def attention(usual, seen):
        S = seen.k.shape[2]
        second = jnp.arange(1, S, 2)  # of each pair
        (k1, k2), (v1, v2) = ((x[:, :, second - 1], x[:, :, second]) for x in (seen.k, seen.v))
        lengths = jnp.linalg.norm(k1, axis=-1) * jnp.linalg.norm(k2, axis=-1)
        alike = (k1 * k2).sum(axis=-1) > threshold * lengths  # [B, K, pairs]
        mask = seen.visible.mask(0, S)[:, None]  # [B, 1, T, S]
        merged = alike[:, :, None] & mask[..., second] & mask[..., second - 1]  # [B, K, T, pairs]
        gone = jnp.zeros((*merged.shape[:3], S), bool)
        gone = gone.at[..., second].set(merged).at[..., second - 1].set(merged)
        tell("merged", gone.sum() / jnp.broadcast_to(mask, gone.shape).sum())
        k = jnp.concatenate([seen.k, (k1 + k2) / 2], axis=2)
        v = jnp.concatenate([seen.v, (v1 + v2) / 2], axis=2)
        bias = jnp.where(jnp.arange(k.shape[2]) < S, 0.0, jnp.log(2.0))
        mask = jnp.concatenate([mask & ~gone, merged], axis=-1)
        return attend_where(seen.q, k, v, mask, bias)[0]

    def reads(usual, told):
        left = 1 - told["merged"] / 2
        few = usual.keys * left
        return usual._replace(keys=few, values=few, slots=usual.slots * left)

    return Idea(attention=attention, reads=reads)
