"""Parts of the cache: some of its rows, the first of its slots, and what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import KVCache, compiler_options, last_logits
from glm2_jax.attention import Visibility, attend, finite_values
from glm2_jax.model import unstack_layers
from tests.support.toy import TOY, jit_forward, random_tokens, toy_params

OPTIONS = compiler_options("cpu")
LENGTHS = jnp.asarray([9, 4, 12, 0], jnp.int32)
SLOTS = 24
ROWS = [2, 7, 0, 4]  # two rows of four, and two that there are not


@pytest.fixture(scope="module")
def filled():
    """A cache of four rows, whose free slots hold keys of NaN."""
    cache = KVCache.zeros(TOY, 4, SLOTS, jnp.float32)
    cache = cache.replace(k=jnp.full_like(cache.k, jnp.nan), v=jnp.full_like(cache.v, 1e30))
    real = jnp.arange(12)[None] < LENGTHS[:, None]
    tokens, segments = random_tokens(4, 12), real.astype(jnp.int32)
    return jit_forward(TOY, toy_params(), tokens, segment_ids=segments, cache=cache)[1]


def program(form, rows, view):
    """`last_logits` of the third token, as a program of tokens, segments and cache."""
    params = form(toy_params())

    def run(tokens, segments, cache):
        index = jnp.full(len(tokens), 2, jnp.int32)
        given = {"segment_ids": segments, "cache": cache, "rows": rows, "view": view}
        return last_logits(TOY, params, tokens, index, **given)

    return jax.jit(run, compiler_options=OPTIONS)


@pytest.mark.parametrize("form", [dict, unstack_layers])
@pytest.mark.parametrize("view", [None, 16])
def test_some_rows_and_slots_are_read_and_written_as_in_the_complete_cache(form, view, filled):
    tokens, rows = random_tokens(4, 5, seed=1), jnp.asarray(ROWS, jnp.int32)
    real = np.array([[1] * 3 + [0] * 2] * 4)  # padding after three tokens
    logits, after = program(form, rows, view)(tokens, jnp.asarray(real), filled)

    places, active = np.array([2, 1, 0, 3]), np.array([1, 0, 1, 0])[:, None]
    everything = tokens[places], jnp.asarray(real * active), filled
    expected, reference = program(form, None, None)(*everything)
    np.testing.assert_allclose(logits[np.array([0, 2])], expected[np.array([2, 0])], atol=1e-5)
    assert jnp.isfinite(logits).all(), "nor are rows that are not there NaN"
    assert after.length.tolist() == reference.length.tolist() == [12, 4, 15, 0]
    for name in ("k", "v"):
        ours, old = np.asarray(getattr(after, name)), np.asarray(getattr(filled, name))
        np.testing.assert_array_equal(ours[:, [1, 3]], old[:, [1, 3]])
        for row, start in ((0, 9), (2, 12)):
            new = ours[:, row, :, start : start + 3]
            theirs = np.asarray(getattr(reference, name))[:, row, :, start : start + 3]
            np.testing.assert_allclose(new, theirs, atol=1e-5)
            kept = np.delete(np.arange(SLOTS), np.s_[start : start + 3])
            np.testing.assert_array_equal(ours[:, row][:, :, kept], old[:, row][:, :, kept])
    with pytest.raises(AssertionError):  # it is these rows that count, not the first ones
        np.testing.assert_allclose(logits[0], expected[0], atol=1e-2)


def test_what_does_not_fit_into_its_row_is_not_written_into_another():
    cache = KVCache.zeros(TOY, 2, 4, jnp.float32).replace(length=jnp.asarray([3, 0]))
    for rows in (None, jnp.asarray([0, 1], jnp.int32)):
        segments = jnp.asarray([[1, 1, 1], [0, 0, 0]])
        given = {"segment_ids": segments, "cache": cache, "rows": rows}
        _, after = jit_forward(TOY, toy_params(), random_tokens(2, 3), **given)
        written = np.abs(after.k).sum(axis=(0, 2, 4)) > 0
        assert written.tolist() == [[False] * 3 + [True], [False] * 4]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_reaches_exactly_the_queries_that_see_it(bad, dtype):
    """The second of four tokens, of which the last is in a segment of its own."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 4, 2, 8), dtype) for i in range(3))
    segments = jnp.asarray([[1, 1, 1, 2]])
    visible = Visibility(jnp.arange(4)[None], segments, segments)

    def out(v):
        keys, values = finite_values(k, v, segments > 0)
        assert keys.dtype == values.dtype == dtype and jnp.isfinite(values).all()
        return attend(q, keys.swapaxes(1, 2), values.swapaxes(1, 2), visible)[0]

    clean, spoiled = out(v), out(v.at[0, 1, 0, 3].set(bad))
    assert not jnp.isfinite(spoiled[1:3, 0]).any()
    np.testing.assert_array_equal(spoiled[jnp.asarray([0, 3])], clean[jnp.asarray([0, 3])])
    np.testing.assert_array_equal(spoiled[:, 1], clean[:, 1])  # the other head


def test_padding_that_is_not_finite_spoils_no_gradient():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 4, 2, 8)) for i in range(3))
    segments = jnp.asarray([[1, 1, 1, 0]])
    visible = Visibility(jnp.arange(4)[None], segments, segments)
    v = v.at[0, 3].set(jnp.inf)

    def loss(q, k, v):
        k, v = finite_values(k, v, segments > 0)
        return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), visible)[:, :3].sum()

    for gradient in jax.grad(loss, (0, 1, 2))(q, k, v):
        assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 0


def test_a_row_that_is_not_finite_spoils_neither_others_nor_the_next_one_in_its_place():
    params = dict(toy_params())
    params["embed"] = params["embed"].at[1].set(jnp.nan)
    tokens = random_tokens(2, 6)
    cache = KVCache.zeros(TOY, 2, 8, jnp.float32)
    clean, _ = jit_forward(TOY, params, tokens, cache=cache)
    logits, spoiled = jit_forward(TOY, params, tokens.at[0, 3].set(1), cache=cache)
    assert jnp.isnan(logits[0, 3:]).all()
    np.testing.assert_array_equal(logits[0, :3], clean[0, :3])
    np.testing.assert_array_equal(logits[1], clean[1])
    assert jnp.isnan(spoiled.k[:, 0, :, 3]).all() and jnp.isfinite(spoiled.v).all()
    freed = spoiled.replace(length=jnp.zeros_like(spoiled.length))
    np.testing.assert_array_equal(jit_forward(TOY, params, tokens, cache=freed)[0], clean)
