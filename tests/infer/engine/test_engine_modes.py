"""JAX's own switches leave the answers as they are."""

import jax
import numpy as np
import pytest

from glm2_jax import init_params
from tests.support.engine_toy import TOY, toy_engine, toy_params

ASKED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.2, "logprobs": 2}
SWITCHES = {"x64": lambda: jax.enable_x64(True), "no jit": lambda: jax.disable_jit(True)}


def answers():
    return toy_engine(max_length=64).generate(["hi", "你好"], max_new_tokens=3, **ASKED)


@pytest.fixture(scope="module")
def usual():
    toy_params()  # made here for all engines below
    return answers()


@pytest.mark.parametrize("switch", SWITCHES)
def test_answers_do_not_depend_on_the_switch(usual, switch):
    with SWITCHES[switch]():
        found = answers()
    assert [(c.output_ids, c.text) for c in found] == [(c.output_ids, c.text) for c in usual]
    for one, other in zip(usual, found, strict=True):
        pairs = zip(one.logprobs or (), other.logprobs or (), strict=True)
        assert all(np.isclose(a.logprob, b.logprob, atol=1e-4) for a, b in pairs)


def test_random_weights_do_not_depend_on_x64():
    with jax.enable_x64(True):
        embed = init_params(TOY, jax.random.key(0))["embed"]
    np.testing.assert_array_equal(embed, init_params(TOY, jax.random.key(0))["embed"])
