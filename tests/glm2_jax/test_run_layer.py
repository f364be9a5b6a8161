"""`run_layer` alone decides what a layer does: an edit of it counts in both forms of the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import KVCache, compiler_options, forward, init_lora, last_logits, model
from glm2_jax.model import hidden, unstack_layers
from tests.support import hurry
from tests.support.toy import TOY, random_tokens, toy_params

OPTIONS = compiler_options("cpu") | hurry.OPTIONS
TOKENS = random_tokens(2, 8)


def twice_after_the_second(original):
    """As users edit a model: something is done between two layers."""

    def run_layer(block, carry, layer, context, lora):
        (x, k, v), out = original(block, carry, layer, context, lora)
        return (jnp.where(layer == 1, 2 * x, x), k, v), out

    return run_layer


def cached(params):
    """The first tokens are read into a cache, and one more in a step of its own."""
    _, cache = forward(TOY, params, TOKENS[:, :7], cache=KVCache.zeros(TOY, 2, 8, jnp.float32))
    return last_logits(TOY, params, TOKENS[:, 7:], jnp.zeros(2, jnp.int32), cache=cache)[0]


def trained(params):
    """The gradient of an adapter and of the embedding."""
    lora = init_lora(TOY, jax.random.key(1), rank=2, targets="all-linear")
    lora = jax.tree.map(lambda x: x + 0.1, lora)

    def loss(lora, embed):
        x = hidden(TOY, {**params, "embed": embed}, TOKENS, lora=lora, remat=True)
        return jnp.mean(jnp.square(x))

    return jax.grad(loss, (0, 1))(lora, params["embed"])


WAYS = {"cached": cached, "trained": trained}


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_counts_in_both_forms_alike(way, monkeypatch):
    params = toy_params()

    def computed(params):  # a new function each time: programs made before the edit do not serve
        program = jax.jit(lambda params: WAYS[way](params), compiler_options=OPTIONS)
        return jax.device_get(jax.tree.leaves(program(params)))

    before = computed(params)
    monkeypatch.setattr(model, "run_layer", twice_after_the_second(model.run_layer))
    stacked, listed = computed(params), computed(unstack_layers(params))
    for old, one, other in zip(before, stacked, listed, strict=True):
        scale = np.abs(one).max()
        assert np.abs(one - old).max() >= 0.01 * scale
        np.testing.assert_allclose(other, one, atol=1e-4 * max(scale, 1), rtol=0)
