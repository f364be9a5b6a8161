"""Keys and values in int8: what is computed is what their dequantized values give."""

import dataclasses
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import KVCache, cache, compiler_options, forward, init_params
from glm2_jax import attention as attention_module
from glm2_jax.attention import Visibility, attend
from glm2_jax.model import unstack_layers
from glm2_jax.prefix import Prefix
from glm2_jax.quant import QTensor, dequantize, quantize_vectors
from tests.support.toy import TOY, random_tokens, toy_params

OPTIONS = compiler_options("cpu")
B, K, G, S, H = 2, 2, 2, 24, 8


def restored(x: QTensor) -> jax.Array:
    return dequantize(x, x.scale.ndim)


def rounded(new: jax.Array, cache) -> jax.Array:
    """Instead of `cache._as_stored`: float keys or values that int8 can hold exactly."""
    return restored(quantize_vectors(new)).astype(cache.dtype)


def test_a_vector_is_rounded_by_its_own_scale():
    x = jax.random.normal(jax.random.key(0), (3, 2, 64)).at[1, 0].multiply(1e4).at[2, 1].set(0)
    small = quantize_vectors(x.astype(jnp.bfloat16))
    assert small.values.dtype == jnp.int8 and small.scale.shape == (3, 2)
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(small.scale[:2], jnp.abs(x).max(-1)[:2] / 127, rtol=1e-6)
    assert (jnp.abs(restored(small) - x) <= 0.501 * small.scale[..., None]).all()
    assert not restored(small)[2, 1].any(), "zeros stay zeros"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_spoils_what_sees_it_and_nothing_else(bad):
    small = quantize_vectors(jnp.ones((2, 8)).at[1, 3].set(bad))
    assert jnp.isnan(restored(small)[1]).all() and not small.values[1].any()
    np.testing.assert_allclose(restored(small)[0], 1, rtol=1e-6)


@pytest.mark.parametrize("scores", [2**25, 40])  # all at once, and in blocks of queries and keys
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_is_that_to_dequantized_keys_and_values(scores, dtype, monkeypatch):
    monkeypatch.setattr(attention_module, "SCORES", scores)
    monkeypatch.setattr(attention_module, "KEYS", 10)
    q, k, v = (
        jax.random.normal(jax.random.key(i), shape, dtype)
        for i, shape in enumerate(((B, 5, K * G, H), (B, K, S, H), (B, K, S, H)))
    )
    places = jnp.asarray([[3, 4, 5, 6, 7], [17, 18, 19, 20, 21]])
    visible = Visibility(places, jnp.ones((B, 5), jnp.int32), jnp.ones((B, S), jnp.int32))
    k, v = quantize_vectors(k), quantize_vectors(v * jnp.arange(1, S + 1, dtype=dtype)[:, None])
    k = QTensor(k.values, k.scale.at[0, :, 8:].set(jnp.nan), 8)  # nobody sees these
    found = attend(q, k, v, visible)
    expected = attend(q, restored(k), restored(v), visible)
    assert found.dtype == dtype and jnp.isfinite(found).all()
    rtol, atol = (1e-5, 1e-5) if dtype == jnp.float32 else (0.02, 0.1)
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def test_small_probabilities_of_small_values_count_in_float16():
    """Each of 4096 keys has the same; times a scale of 0.001 it has four bits left in float16."""
    q, k = jnp.zeros((1, 1, 1, H), jnp.float16), jnp.zeros((1, 1, 4096, H), jnp.float16)
    v = 0.05 + jax.random.uniform(jax.random.key(0), k.shape) / 20
    visible = Visibility(jnp.full((1, 1), 4095), jnp.ones((1, 1)), jnp.ones((1, 4096)))
    found = attend(q, quantize_vectors(k), quantize_vectors(v.astype(jnp.float16)), visible)
    np.testing.assert_allclose(found[0, 0, 0], v.mean((0, 1, 2)), rtol=2e-3)


def steps(dtype):
    """A prompt in two parts, then rows 1 and 3 alone in a view, then a step of all: their logits,
    and the cache."""

    def run(params, tokens):
        kept = KVCache.zeros(TOY, 4, 40, dtype)
        logits = []
        for start, stop in ((0, 7), (7, 12)):
            out, kept = forward(TOY, params, tokens[:, start:stop], cache=kept)
            logits.append(out)
        rows = jnp.asarray([3, 9, 1], jnp.int32)  # one row that there is not
        some = {"rows": rows, "view": 16}
        out, kept = forward(TOY, params, tokens[:3, 12:15], cache=kept, **some)
        logits += [out[jnp.asarray([0, 2])]]
        out, kept = forward(TOY, params, tokens[:, 15:16], cache=kept)
        return [*logits, out], kept

    tokens = random_tokens(4, 16)
    return jax.jit(run, compiler_options=OPTIONS)(toy_params(), tokens)


def test_parts_rows_and_steps_are_those_of_dequantized_keys_and_values():
    found, small = steps(jnp.int8)
    with mock.patch.object(cache, "_as_stored", rounded):
        expected, large = steps(jnp.float32)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_allclose(restored(small.k), large.k, atol=2e-5)
    np.testing.assert_allclose(restored(small.v), large.v, atol=2e-5)
    assert small.length.tolist() == large.length.tolist() == [13, 16, 13, 16]
    exact, _ = steps(jnp.float32)  # and int8 is not far from float32, but not the same
    off = np.abs(exact[-1] - found[-1]).max()
    assert 1e-4 < off < 0.1 * np.abs(exact[-1]).max()


def test_a_row_that_is_not_finite_ends_alone():
    params = dict(toy_params())
    params["embed"] = params["embed"].at[1].set(jnp.nan)
    tokens = random_tokens(2, 6)
    kept = KVCache.zeros(TOY, 2, 8, jnp.int8)
    run = jax.jit(lambda tokens, kept: forward(TOY, params, tokens, cache=kept))
    clean, _ = run(tokens, kept)
    logits, spoiled = run(tokens.at[0, 3].set(1), kept)
    assert jnp.isnan(logits[0, 3:]).all() and jnp.isfinite(spoiled.v.scale).all()
    np.testing.assert_array_equal(logits[0, :3], clean[0, :3])
    np.testing.assert_array_equal(logits[1], clean[1])
    freed = spoiled.replace(length=jnp.zeros_like(spoiled.length))
    np.testing.assert_array_equal(run(tokens, freed)[0], clean)


def test_a_prefix_begins_every_row():
    P, shape = 3, (TOY.num_layers, 3, TOY.num_kv_heads, TOY.head_dim)
    prefix = Prefix(*(jax.random.normal(jax.random.key(i), shape) for i in range(2)))
    kept = KVCache.new(TOY, 2, 8, jnp.int8, prefix)
    for stored, given in ((kept.k, prefix.k), (kept.v, prefix.v)):
        found = restored(stored)[:, :, :, :P]
        np.testing.assert_allclose(found[:, 0], given.swapaxes(1, 2), atol=0.02)
        np.testing.assert_array_equal(found[:, 0], found[:, 1])
        assert not stored.values[:, :, :, P:].any()


@pytest.mark.parametrize("form", [dict, unstack_layers])
def test_a_step_makes_no_float_copy_of_the_cache(form):
    """Its temporaries are those of one layer, however many there are."""

    def temporaries(layers: int) -> int:
        config = dataclasses.replace(TOY, num_layers=layers)
        params = jax.eval_shape(lambda: form(init_params(config, jax.random.key(0))))
        kept = jax.eval_shape(lambda: KVCache.zeros(config, 2, 4096, jnp.int8))
        step = jax.jit(partial(forward, config), donate_argnames="cache")
        tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
        program = step.lower(params, tokens, cache=kept).compile(compiler_options=OPTIONS)
        return program.memory_analysis().temp_size_in_bytes

    few, many = temporaries(2), temporaries(6)
    layer = 2 * 4096 * TOY.num_kv_heads * TOY.head_dim * 4  # keys or values as float32
    assert many < few + layer / 2 and many < 3 * layer
