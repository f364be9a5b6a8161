"""Self-speculative decoding: the model without some of its layers drafts, the model verifies.

No second model and no second cache: the layers that draft read and write the cache of the model,
and verifying overwrites what they wrote. The answer is that of the model alone. Source: Zhang et
al., "Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding",
2023.

Buys: several tokens for each pass over all layers, where the drafts are accepted. Costs: a pass
over the drafting layers, and the head, for each draft; so it needs a model of which most layers can
be skipped, and a step that waits for memory, not for arithmetic.
"""

import jax.numpy as jnp

from glm2_jax.ideas import Idea


def idea(*, skip: int = 2, drafts: int = 3) -> Idea:
    """Draft without `skip` layers in the middle."""

    def blocks(layers, carry):
        first = (layers.count - skip) // 2
        for layer in [*range(first), *range(first + skip, layers.count)]:
            carry = layers.run(carry, layer)
        return carry

    few = Idea(blocks=blocks)

    def draft(step, token, cache):
        found = []
        for _ in range(drafts):
            logits, cache = step(token, cache, few)
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            found.append(token)
        return jnp.stack(found, axis=1), cache

    def reads(usual, told):
        layers = usual.layers + drafts * (usual.layers - skip)
        return usual._replace(layers=layers, heads=1 + drafts)

    return Idea(draft=draft, drafts=drafts, reads=reads)
