"""Sliding window with attention sinks: a query sees the first tokens and the last ones.

The first tokens of a text draw much attention whatever they are; a window without them breaks the
model. Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023. There
positions are counted within the window; here they stay those of the text.

Buys: a decode step reads `sinks + window` keys and values, however long the text is. Costs: all
that is said between the two is lost. The cache here keeps all slots; a ring would need no more
than those that are read.
"""

import jax.numpy as jnp

from glm2_jax.attention import attend_where
from glm2_jax.cache import take_slots
from glm2_jax.ideas import Idea


def idea(*, window: int = 16, sinks: int = 4) -> Idea:
    def attention(usual, seen):
        S, T = seen.k.shape[2], seen.q.shape[1]
        places, mask = seen.visible.places, seen.visible.mask(0, S)
        if T > 1:
            slots = jnp.arange(S)
            near = (slots > places[..., None] - window) | (slots < sinks)
            return attend_where(seen.q, seen.k, seen.v, mask & near)[0]
        last = places - jnp.arange(window)  # [B, window]
        first = jnp.broadcast_to(jnp.arange(sinks), (len(places), sinks))
        slots = jnp.concatenate([first, jnp.where(last >= sinks, last, S)], axis=1)
        mask = jnp.take_along_axis(mask, slots[:, None], axis=2, mode="fill", fill_value=False)
        slots = jnp.minimum(slots, S - 1)[:, None]
        return attend_where(seen.q, take_slots(seen.k, slots), take_slots(seen.v, slots), mask)[0]

    def reads(usual, told):
        few = min(usual.keys, sinks + window)
        return usual._replace(keys=few, values=few, slots=min(usual.slots, sinks + window))

    return Idea(attention=attention, reads=reads)
