"""Layer skipping: the layers that change their input least are not run.

How much a layer changes is measured on the prompts: 1 - the cosine between its input and its
output, averaged over the tokens. Source: Men et al., "ShortGPT: Layers in Large Language Models are
More Redundant Than You Expect", 2024.

Buys: the weights, the arithmetic and the cached keys of the skipped layers, in every program.
Costs: quality, and the more the fewer layers a model has. The cache still has room for all layers.
"""

import jax.numpy as jnp

from glm2_jax.ideas import Idea, tell
from infer.lab.sample import Sample


def cosine(a, b):
    """The cosine between vectors, [..., D] -> float32 [...]."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return (a * b).sum(-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))


def importance(sample: Sample) -> list[float]:
    """How much each layer changes what goes through it."""

    def blocks(layers, carry):
        for layer in range(layers.count):
            before, carry = carry[0], layers.run(carry, layer)
            tell(str(layer), 1 - cosine(before, carry[0]))
        return carry

    told = sample.measure(Idea(blocks=blocks))
    return [told[str(layer)] for layer in range(len(told))]


def idea(sample: Sample, *, skip: int = 1) -> Idea:
    changes = importance(sample)
    skipped = sorted(range(len(changes)), key=lambda layer: changes[layer])[:skip]

    def blocks(layers, carry):
        for layer in range(layers.count):
            if layer not in skipped:
                carry = layers.run(carry, layer)
        return carry

    def reads(usual, told):
        run = usual.layers - len(skipped)
        return usual._replace(layers=run, slots=usual.slots * run / usual.layers)

    return Idea(blocks=blocks, reads=reads)
