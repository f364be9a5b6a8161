"""The hooks of an idea: without one nothing changes, and what a hook returns is checked."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import KVCache, forward
from glm2_jax.errors import InputError, UsageError
from glm2_jax.ideas import Idea, Reads, check_reads, listening, tell
from glm2_jax.model import unstack_layers
from infer.engine import steps
from tests.support import toy
from tests.support.toy import abstract_params, random_tokens, toy_params

TOY = dataclasses.replace(toy.TOY, num_layers=2)
LISTED = jax.eval_shape(unstack_layers, abstract_params(TOY))
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


def in_order(layers, carry):
    for layer in range(layers.count):
        carry = layers.run(carry, layer)
    return carry


def having(**hooks):
    return dataclasses.replace(TOY, idea=Idea(**hooks))


def traced(config, params=LISTED):
    """What a forward pass returns, without computing it."""
    return jax.eval_shape(partial(forward, config), params, TOKENS)


def decode_text(config) -> str:
    """The program of a decode step, before the compiler."""
    cache = jax.eval_shape(lambda: KVCache.zeros(config, 2, 32, jnp.float32))
    counts = jnp.zeros((2, config.vocab_size), jnp.int16)
    ones = jnp.ones(2, jnp.int32)
    state = steps.State(None, ones, counts, ones > 0, ones)
    args = LISTED, np.ones(2, bool), state, None, None, cache
    return jax.jit(partial(steps.decode, config, None)).lower(*args).as_text()


def test_an_idea_that_does_as_usual_leaves_the_program_as_it_is():
    plain = decode_text(TOY)
    assert decode_text(having()) == plain
    usual = having(blocks=in_order, attention=lambda usual, seen: usual(seen))
    assert decode_text(usual) == plain
    telling = having(blocks=lambda layers, carry: tell("x", carry[0]) or in_order(layers, carry))
    assert decode_text(telling) == plain  # nobody listens
    skipping = having(blocks=lambda layers, carry: layers.run(carry, 0))
    assert len(decode_text(skipping)) < len(plain)


def test_a_configuration_with_an_idea_is_another_one_and_is_never_written():
    tried = having(blocks=in_order)
    assert tried != TOY and hash(tried) != hash(TOY)
    assert tried.to_hf() == TOY.to_hf()


def attention_of(shape):
    return lambda usual, seen: jnp.zeros(shape, seen.q.dtype)


@pytest.mark.parametrize(
    ("hooks", "expected", "got"),
    [
        ({"attention": attention_of((2, 5, 4, 8))}, "float32 [2, 5, 4, 16]", "[2, 5, 4, 8]"),
        ({"attention": lambda usual, seen: None}, "float32 [2, 5, 4, 16]", "None"),
        ({"blocks": lambda layers, carry: carry[0]}, "(float32 [2, 5, 48], None, None)", "[2, 5"),
        (
            {"attention": lambda usual, seen: (usual(seen), {}), "notes": ("score",)},
            "'score': 'float32 [2, 2, 5]'", "{}",
        ),
    ],
)  # fmt: skip
def test_other_shapes_are_refused_with_the_line_of_the_hook(hooks, expected, got):
    with pytest.raises(InputError) as error:
        traced(having(**hooks))
    assert "test_ideas.py:" in error.value.what
    assert expected in error.value.why.split(", got ")[0] and got in error.value.why


def test_drafts_of_other_shapes_are_refused():
    cache = jax.eval_shape(lambda: KVCache.zeros(TOY, 2, 32, jnp.float32))
    ones = jnp.ones(2, jnp.int32)
    state = steps.State(None, ones, ones, ones > 0, ones)
    config = having(draft=lambda step, token, cache: (token, cache), drafts=3)
    with pytest.raises(InputError, match=r"(?s)test_ideas.py:.*int32 \[2, 3\].*got \(int32 \[2\]"):
        jax.eval_shape(partial(steps.draft, config), LISTED, ones > 0, state, cache)
    with pytest.raises(UsageError, match="both `draft` and `drafts`"):
        Idea(drafts=3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention": 5}, "`attention` of an idea is not valid"),
        ({"blocks": "x"}, "Expected a function of (layers, carry), or None, got 'x'"),
        ({"attention": lambda seen: seen.q}, "Expected a function of (usual, seen), or None"),
        ({"draft": lambda step, token: 0, "drafts": 1}, "Expected a function of (step, token, c"),
        ({"reads": exit}, "Expected a function of (usual, told), or None"),
        ({"notes": "mass"}, "Expected a tuple of different names"),
        ({"notes": ("a", "a")}, "Expected a tuple of different names"),
        ({"notes": ("a",)}, "with `notes` needs `attention`"),
        ({"kv": "int4"}, "Expected 'auto', 'int8', or None, got 'int4'"),
        ({"drafts": 1.5}, "Expected an integer, 0 or more, got 1.5"),
        ({"drafts": -1}, "Expected an integer, 0 or more, got -1"),
        ({"drafts": True}, "Expected an integer, 0 or more, got True"),
    ],
)
def test_fields_that_make_no_program_are_refused(fields, words):
    with pytest.raises(UsageError) as error:
        Idea(**fields)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": "many"}, "returned layers='many'"),
        ({"layers": -95}, "returned layers=-95"),
        ({"keys": float("nan")}, "returned keys=nan"),
        ({"slots": float("inf")}, "Expected a finite number, 0 or more"),
        ({"notes": None}, "returned notes=None"),
        ({"tokens": 0}, "Expected a finite number, above 0"),
    ],
)
def test_numbers_that_a_step_cannot_read_are_refused(changes, words):
    usual = Reads(4, 1, 9, 9, 9)
    with pytest.raises(InputError, match=r"test_ideas.py:\d+: in_order") as error:
        check_reads(in_order, usual._replace(**changes))
    assert words in str(error.value)
    assert check_reads(in_order, usual._replace(keys=np.float32(3))) == usual._replace(keys=3)
    with pytest.raises(InputError, match="Expected Reads"):
        check_reads(in_order, (4, 1))


def test_stacked_layers_are_refused_where_an_idea_runs_them():
    with pytest.raises(UsageError, match="layers as a list"):
        traced(having(blocks=in_order), abstract_params(TOY))


def test_notes_stay_with_their_slots_and_what_is_told_is_heard():
    """A note of each key that a query saw, kept by the cache until the slot is written again."""

    def attention(usual, seen):
        tell("layer", jnp.full(4, seen.layer))
        saw = seen.visible.mask(0, seen.k.shape[2]).sum(axis=1, dtype=jnp.float32)
        return usual(seen), {"saw": seen.notes["saw"] + saw[:, None]}

    config = having(attention=attention, notes=("saw",))
    step = jax.jit(partial(forward, config))
    params, tokens = unstack_layers(toy_params(TOY)), random_tokens(2, 3)
    cache = KVCache.zeros(config, 2, 8, jnp.float32)
    with listening() as told:
        for _ in range(2):
            cache = step(params, tokens, cache=cache)[1]
    assert sorted(told["layer"]) == [0, 0, 1, 1]
    saw = np.array([6, 5, 4, 3, 2, 1, 0, 0])
    assert (np.asarray(cache.k.notes["saw"]) == saw).all()
    cache = dataclasses.replace(cache, length=jnp.full(2, 3))
    cache = step(params, tokens, cache=cache)[1]
    assert (np.asarray(cache.k.notes["saw"]) == saw + [3, 3, 3, 0, 0, 0, 0, 0]).all()
