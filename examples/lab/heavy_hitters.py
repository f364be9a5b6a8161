"""Heavy-hitter eviction: each head keeps the keys that got most attention, and the recent ones.

A step adds the attention that each key gets to its score; when a head has more than `budget` keys,
it evicts the one with the lowest score that is not among the last `recent`, for good. Source:
Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models", 2023.

Buys: a decode step reads `budget` keys and values of each head. Costs: a score for each key; what
is evicted cannot be seen again; a prompt is read token by token. The cache here keeps all slots and
all scores; one that reuses the evicted slots would need no more than the budget.
"""

import jax
import jax.numpy as jnp

from glm2_jax.attention import attend_where
from glm2_jax.cache import take_slots
from glm2_jax.ideas import Idea


def idea(*, budget: int = 20, recent: int = 10) -> Idea:
    recent = min(recent, budget - 1)

    def attention(usual, seen):
        S = seen.k.shape[2]
        slots = jnp.arange(S)

        def step(score, token):  # one query of each row; a score of -1: evicted
            q, mask, place = token  # [B, 1, N, H], [B, S], [B]
            kept = mask[:, None] & (score >= 0)  # [B, K, S]; at most one more than the budget
            _, few = jax.lax.top_k(kept, min(budget + 1, S))
            there = jnp.take_along_axis(kept, few, axis=2)
            k, v = take_slots(seen.k, few), take_slots(seen.v, few)
            out, probs = attend_where(q, k, v, there[:, :, None])
            got = jnp.where(there, probs.sum(axis=(2, 3)), 0)  # of all queries of the head
            score = score + jnp.put_along_axis(jnp.zeros_like(score), few, got, 2, inplace=False)
            old = kept & (slots <= place[:, None, None] - recent)
            worst = jnp.where(old, score, jnp.inf).argmin(axis=-1, keepdims=True)
            full = kept.sum(axis=-1, keepdims=True) > budget
            return jnp.where(full & old & (slots == worst), -1.0, score), out[:, 0]

        mask = seen.visible.mask(0, S)
        tokens = seen.q[:, :, None], mask, seen.visible.places
        tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), tokens)
        score, out = jax.lax.scan(step, seen.notes["score"], tokens)
        return out.swapaxes(0, 1), {"score": score}

    def reads(usual, told):
        few = min(usual.keys, budget)
        return usual._replace(keys=few, values=few, slots=min(usual.slots, budget), notes=few)

    return Idea(attention=attention, notes=("score",), reads=reads)
