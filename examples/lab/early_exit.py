"""Early exit: a token whose next word is clear after a few layers skips the rest.

After each layer the head is asked; once its largest probability exceeds the threshold, the hidden
state of this token stays as it is. Later layers still make keys and values of that state, since
later tokens look for them. Source: Schuster et al., "Confident Adaptive Language Modeling", 2022.

Buys, in principle: the weights of the layers after the exit, but for those of k and v.
Costs: the head after every layer, which is large where the vocabulary is; and quality, as these
heads were not trained. The program here computes all layers and drops what is not wanted, since
each token of a batch would leave at another layer: it is slower than the model.
"""

import jax
import jax.numpy as jnp

from glm2_jax.ideas import Idea, tell


def idea(*, threshold: float = 0.9, first: int = 2) -> Idea:
    """`first`: the layers that every token runs."""

    def blocks(layers, carry):
        done = jnp.zeros(carry[0].shape[:2], bool)
        ran = asked = jnp.zeros(carry[0].shape[:2])
        for layer in range(layers.count):
            before, (x, keys, values) = carry[0], layers.run(carry, layer)
            carry = jnp.where(done[..., None], before, x), keys, values
            ran += ~done
            if first <= layer + 1 < layers.count:
                asked += ~done
                done |= jax.nn.softmax(layers.logits(carry[0])).max(axis=-1) > threshold
        tell("layers", ran)
        tell("heads", asked + ~done)  # the last one asked gives the logits
        return carry

    def reads(usual, told):
        rest = usual.layers - told["layers"]
        return usual._replace(layers=told["layers"], heads=told["heads"], projections=rest)

    return Idea(blocks=blocks, reads=reads)
