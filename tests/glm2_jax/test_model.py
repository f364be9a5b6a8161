"""The model against itself: every way to run it gives the same logits."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import (
    PRESETS,
    KVCache,
    compiler_options,
    forward,
    hidden,
    init_lora,
    init_params,
    last_logits,
    model,
    param_shapes,
)
from glm2_jax.context import token_context
from glm2_jax.linear import einsum
from glm2_jax.model import unstack_layers
from glm2_jax.norms import rms_norm
from tests.support.toy import TOY, jit_forward, random_tokens, toy_params

OPTIONS = compiler_options("cpu")
CLOSE = 1e-4  # what the forms of one computation may differ by, on logits of unit scale


def assert_same(ours, reference):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(reference), atol=CLOSE, rtol=0)
    assert (np.argmax(ours, -1) == np.argmax(reference, -1)).all()


@pytest.fixture(scope="module")
def params():
    return toy_params()


LENGTH, SLOTS = 14, 20  # of rows and caches: few shapes, few programs


def plain(params, tokens, **kwargs):
    return jit_forward(TOY, params, tokens, **kwargs)[0]


def padded(params, tokens, left=0):
    """Logits of a row [1, n], which is padded to LENGTH."""
    n = tokens.shape[1]
    padding = ((0, 0), (left, LENGTH - n - left))
    positions = jnp.pad(jnp.arange(n, dtype=jnp.int32)[None], padding)
    where = {"positions": positions, "segment_ids": jnp.pad(jnp.ones_like(tokens), padding)}
    return plain(params, jnp.pad(tokens, padding), **where)[:, left : left + n]


def test_layout():
    L, V, D, F, N, K, H = 28, 65024, 4096, 13696, 32, 2, 128
    queries = {"q": (L, N, H, D), "q_bias": (L, N, H), "o": (L, D, N, H)}
    keys = {"k": (L, K, H, D), "k_bias": (L, K, H), "v": (L, K, H, D), "v_bias": (L, K, H)}
    mlp = {"gate_up": (L, 2, F, D), "down": (L, D, F)}
    layers = {"attn_norm": (L, D), "mlp_norm": (L, D), **queries, **keys, **mlp}
    outside = {"embed": (V, D), "final_norm": (D,), "head": (V, D)}
    assert param_shapes(PRESETS["chatglm2-6b"]) == {"layers": layers, **outside}
    assert jax.tree.map(lambda x: x.shape, toy_params()) == param_shapes(TOY)


def test_norms_and_products_round_once():
    x, weight = jnp.asarray([[3.0, 4.0]]), jnp.asarray([1.0, 10.0])
    expected = np.array([[3.0, 40.0]]) / np.sqrt(12.5 + 1e-5)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), expected, rtol=1e-6)
    half = jax.random.normal(jax.random.key(0), (4, 64)).astype(jnp.bfloat16)
    scale = jnp.linspace(0.5, 2, 64).astype(jnp.bfloat16)
    exact = rms_norm(half.astype(jnp.float32), scale.astype(jnp.float32), 1e-5)
    np.testing.assert_array_equal(rms_norm(half, scale, 1e-5), exact.astype(jnp.bfloat16))
    ones = jnp.ones((1, 1, 4096), jnp.bfloat16)
    out = einsum("BTD,FD->BTF", ones, ones[0])
    assert out.dtype == jnp.float32 and float(out[0, 0, 0]) == 4096.0


def test_padding_and_later_tokens_change_nothing(params):
    tokens = random_tokens(2, LENGTH)
    reference = plain(params, tokens)
    changed = plain(params, tokens.at[0, 9].set((tokens[0, 9] + 1) % TOY.vocab_size))
    np.testing.assert_array_equal(reference[0, :9], changed[0, :9])
    assert np.abs(reference[0, 9:] - changed[0, 9:]).min() > 0
    for left in (0, 2, 5):
        assert_same(padded(params, tokens[:1, :9], left), reference[:1, :9])


def test_packed_segments_are_separate_sequences(params):
    parts = [random_tokens(1, n, seed=n) for n in (4, 1, 6)]
    tokens = jnp.concatenate([*parts, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segment_ids = jnp.asarray([[1] * 4 + [2] + [3] * 6 + [0] * 3], jnp.int32)
    positions = jnp.concatenate([jnp.arange(n) for n in (4, 1, 6, 3)])[None].astype(jnp.int32)
    ours = plain(params, tokens, positions=positions, segment_ids=segment_ids)
    for start, part in zip((0, 4, 5), parts, strict=True):
        assert_same(ours[:, start : start + part.shape[1]], padded(params, part))


def test_prefill_and_single_steps(params):
    """What unwritten slots hold never reaches a result: keys of NaN, and finite values."""
    tokens = random_tokens(2, LENGTH)
    reference = plain(params, tokens)
    cache = KVCache.zeros(TOY, 2, SLOTS, jnp.float32)
    cache = cache.replace(k=jnp.full_like(cache.k, jnp.nan), v=jnp.full_like(cache.v, 1e30))
    logits, cache = jit_forward(TOY, params, tokens[:, :6], cache=cache)
    assert_same(logits, reference[:, :6])
    for t in range(6, LENGTH):
        logits, cache = jit_forward(TOY, params, tokens[:, t : t + 1], cache=cache)
        assert_same(logits[:, 0], reference[:, t])
    np.testing.assert_array_equal(cache.length, [LENGTH, LENGTH])


def test_rows_at_different_lengths_and_padding_inside_the_cache(params):
    first, second = random_tokens(1, 13, seed=1), random_tokens(1, 9, seed=2)
    expected = padded(params, first)[0], padded(params, second)[0]
    cache = KVCache.zeros(TOY, 2, SLOTS, jnp.float32)
    # Row 0 takes 7 tokens after 1 of padding, row 1 takes 3 before 5 of padding.
    tokens = jnp.zeros((2, 8), jnp.int32).at[0, 1:].set(first[0, :7]).at[1, :3].set(second[0, :3])
    segment_ids = jnp.asarray([[0] + [1] * 7, [1] * 3 + [0] * 5], jnp.int32)
    logits, cache = jit_forward(TOY, params, tokens, segment_ids=segment_ids, cache=cache)
    np.testing.assert_array_equal(cache.length, [7, 3])
    assert_same(logits[0, 1:], expected[0][:7])
    assert_same(logits[1, :3], expected[1][:3])
    # Six tokens more for each: they continue at different places.
    more = jnp.concatenate([first[:, 7:], second[:, 3:]])
    logits, cache = jit_forward(TOY, params, more, cache=cache)
    assert_same(logits[0], expected[0][7:])
    assert_same(logits[1], expected[1][3:])
    np.testing.assert_array_equal(cache.length, [13, 9])
    # An idle row is neither written nor counted.
    idle = jnp.asarray([[1], [0]], jnp.int32)
    _, after = jit_forward(TOY, params, tokens[:, 1:2], segment_ids=idle, cache=cache)
    np.testing.assert_array_equal(after.length, [14, 9])
    np.testing.assert_array_equal(after.k[:, 1], cache.k[:, 1])
    assert np.abs(after.k[:, 0, :, 13]).max() > 0


def test_a_row_is_freed_by_its_length_and_a_full_one_drops_what_does_not_fit(params):
    old, new = random_tokens(1, 4, seed=5), random_tokens(1, 4, seed=6)
    cache = KVCache.zeros(TOY, 1, 4, jnp.float32)
    _, full = jit_forward(TOY, params, old, cache=cache)
    _, after = jit_forward(TOY, params, new, cache=full)
    np.testing.assert_array_equal(after.k, full.k)
    cache = full.replace(length=jnp.zeros_like(full.length))
    logits, _ = jit_forward(TOY, params, new, cache=cache)
    assert_same(logits, padded(params, new))


def test_last_logits_are_one_column_of_forward(params):
    tokens, index = random_tokens(2, LENGTH), jnp.asarray([0, 6], jnp.int32)
    picked, _ = jax.jit(last_logits, static_argnums=0)(TOY, params, tokens, index)
    assert_same(picked, plain(params, tokens)[jnp.arange(2), index])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_near_and_logits_stay_float32(params, dtype):
    tokens = random_tokens(2, LENGTH)
    reference = plain(params, tokens)
    half = jax.tree.map(lambda x: x.astype(dtype), params)
    cache = KVCache.zeros(TOY, 2, SLOTS, dtype)
    logits, cache = jit_forward(TOY, half, tokens, cache=cache)
    assert logits.dtype == jnp.float32 and cache.k.dtype == dtype
    assert jnp.linalg.norm(logits - reference) < 0.05 * jnp.linalg.norm(reference)


def test_dropout_only_with_a_key(params):
    tokens, keys = random_tokens(2, LENGTH), [jax.random.key(seed) for seed in (0, 0, 1)]
    reference = plain(params, tokens)
    texts = set()
    for rates in ({"hidden_dropout": 0.5}, {"attention_dropout": 0.5}):
        config = dataclasses.replace(TOY, **rates)
        drawn = [jit_forward(config, params, tokens, dropout_key=key)[0] for key in keys]
        np.testing.assert_array_equal(drawn[0], drawn[1])
        assert min(np.abs(drawn[0] - other).max() for other in (drawn[2], reference)) > 0.01
        texts.add(jit_forward.lower(config, params, tokens).as_text())
    assert texts == {jit_forward.lower(TOY, params, tokens).as_text()}


def test_logn_scaling_by_hand(params):
    config = dataclasses.replace(TOY, logn_scaling=True)
    tokens = random_tokens(1, 6)
    context, _ = token_context(config, tokens, None, None, None, jnp.float32)
    np.testing.assert_array_equal(context.query_scale, np.ones((1, 6, 1, 1)))
    cache = KVCache.zeros(config, 1, 4, jnp.float32).replace(length=jnp.asarray([9934]))
    context, _ = token_context(config, tokens[:, :1], None, None, cache, jnp.float32)
    expected = np.log(64 + 9934 + 1) / np.log(2048)
    np.testing.assert_allclose(context.query_scale[0, 0, 0, 0], expected, rtol=1e-6)


def decode_step(config, dtype, batch, size):
    """The compiled program of one decode step over abstract weights."""
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    cache = jax.eval_shape(lambda: KVCache.zeros(config, batch, size, dtype))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)

    def step(params, tokens, cache):
        return forward(config, params, tokens, cache=cache)

    jitted = jax.jit(step, donate_argnums=2, compiler_options=compiler_options("cpu"))
    return params, cache, jitted.lower(params, tokens, cache).compile()


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cached(params):
    """The first tokens are read into a cache, and one more in a step of its own."""
    tokens, zero = random_tokens(2, 8), jnp.zeros(2, jnp.int32)
    _, cache = forward(TOY, params, tokens[:, :7], cache=KVCache.zeros(TOY, 2, 8, jnp.float32))
    return last_logits(TOY, params, tokens[:, 7:], zero, cache=cache)[0]


def trained(params):
    """The gradient of an adapter and of the embedding."""
    lora = init_lora(TOY, jax.random.key(1), rank=2, targets="all-linear")

    def loss(lora, embed):
        x = hidden(TOY, {**params, "embed": embed}, random_tokens(2, 8), lora=lora, remat="full")
        return jnp.mean(jnp.square(x))

    return jax.grad(loss, (0, 1))(jax.tree.map(lambda x: x + 0.1, lora), params["embed"])


@pytest.mark.parametrize("way", [cached, trained])
def test_an_edit_of_run_layer_counts_in_both_forms_alike(way, params, monkeypatch):
    """As users edit a model: something is done between two layers."""

    def edited(block, carry, layer, context, lora, original=model.run_layer):
        (x, k, v), out = original(block, carry, layer, context, lora)
        return (jnp.where(layer == 1, 2 * x, x), k, v), out

    def computed(params):  # a new function each time: programs made before the edit do not serve
        program = jax.jit(lambda params: way(params), compiler_options=OPTIONS)
        return jax.device_get(jax.tree.leaves(program(params)))

    before = computed(params)
    monkeypatch.setattr(model, "run_layer", edited)
    stacked, listed = computed(params), computed(unstack_layers(params))
    for old, one, other in zip(before, stacked, listed, strict=True):
        scale = np.abs(one).max()
        assert np.abs(one - old).max() >= 0.01 * scale
        np.testing.assert_allclose(other, one, atol=1e-4 * max(scale, 1), rtol=0)


def test_a_program_traces_one_layer_of_a_list(params, monkeypatch):
    traced = []

    def counted(*args, original=model.run_layer):
        traced.append(args[2])
        return original(*args)

    monkeypatch.setattr(model, "run_layer", counted)
    cache = KVCache.zeros(TOY, 2, 8, jnp.float32)
    step = partial(forward, TOY, unstack_layers(params))
    jax.eval_shape(lambda tokens, cache: step(tokens, cache=cache), random_tokens(2, 1), cache)
    assert len(traced) == 1 < TOY.num_layers


def test_the_cache_is_updated_in_place():
    config = dataclasses.replace(TOY, num_layers=16)
    _, cache, program = decode_step(config, jnp.float32, batch=4, size=4096)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes((cache.k, cache.v))
    assert memory.temp_size_in_bytes < 0.2 * nbytes((cache.k, cache.v))


def test_no_float32_copy_of_half_precision_weights_is_hoisted():
    config = dataclasses.replace(
        TOY, num_layers=16, hidden_size=256, ffn_hidden_size=1024, num_heads=8, head_dim=32
    )
    params, _, program = decode_step(config, jnp.bfloat16, batch=2, size=64)
    layers = nbytes(params["layers"])
    # One layer's weights in float32 are 2/16 of all of them in half precision.
    assert program.memory_analysis().temp_size_in_bytes < 0.5 * layers
