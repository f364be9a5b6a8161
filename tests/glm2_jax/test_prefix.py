"""P-Tuning v2 prefixes in the model: the published arrays, and a plain counterpart in torch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from convert.adapters.prefix import load_prefix
from glm2_jax import GLMConfig, KVCache, attention
from glm2_jax.model import forward, unstack_layers
from glm2_jax.prefix import Prefix, prefix_length, with_prefix
from glm2_jax.schemes import SCHEMES
from tests.glm2_jax.test_parity import TOLERANCE, greedy, published_params
from tests.support.checkpoints import TINY, random_params
from tests.support.peft_oracle import torch_logits
from tests.support.prefixes import encoder, numpy_prefix, write_prefix
from tests.support.shared_data import shared_path
from tests.support.toy import jit_forward, quantized, random_tokens

P = 5
K, V = numpy_prefix(TINY, encoder(TINY, P, projection=True))
PARAMS = jax.tree.map(jnp.asarray, random_params(TINY))  # nothing to compile
PREFIXED = with_prefix(PARAMS, Prefix(jnp.asarray(K), jnp.asarray(V)))


def test_logits_are_those_of_a_plain_counterpart():
    tokens = random_tokens(2, 10, TINY)
    expected = np.stack([torch_logits(TINY, PARAMS, row, K, V) for row in tokens])
    logits, cache = jit_forward(TINY, PREFIXED, tokens)
    assert cache is None and prefix_length(PREFIXED) == P and prefix_length(PARAMS) == 0
    assert np.abs(logits - expected).max() <= TOLERANCE
    without = torch_logits(TINY, PARAMS, tokens[0])
    assert np.abs(without - expected[0]).max() > 100 * TOLERANCE, "the prefix is attended to"

    cache = KVCache.new(TINY, 2, 12, jnp.float32, PREFIXED["prefix"])
    assert cache.size == P + 12 and cache.length.tolist() == cache.prefix.tolist() == [P, P]
    first, cache = jit_forward(TINY, PREFIXED, tokens[:, :5], cache=cache)
    rest, cache = jit_forward(TINY, PREFIXED, tokens[:, 5:], cache=cache)
    assert np.abs(np.concatenate([first, rest], 1) - expected).max() <= TOLERANCE
    assert cache is not None and cache.length.tolist() == [P + 10] * 2


def test_segments_of_a_packed_row_each_have_the_prefix(monkeypatch):
    one, two = random_tokens(1, 4, TINY, 1), random_tokens(1, 6, TINY, 2)
    row = jnp.concatenate([one, two, jnp.zeros((1, 2), jnp.int32)], axis=1)
    packed = {
        "segment_ids": jnp.asarray([[1] * 4 + [2] * 6 + [0] * 2]),
        "positions": jnp.asarray([[*range(4), *range(6), 0, 0]]),
    }
    # Blocks of keys and queries, which divide nothing evenly: the prefix is in the first of them.
    monkeypatch.setattr(attention, "SCORES", 60)
    monkeypatch.setattr(attention, "KEYS", 4)
    logits, _ = jax.jit(lambda *args: forward(TINY, *args, **packed))(PREFIXED, row)
    for found, tokens in ((logits[0, :4], one), (logits[0, 4:10], two)):
        expected = torch_logits(TINY, PARAMS, tokens[0], K, V)
        assert np.abs(found - expected).max() <= TOLERANCE
    assert jnp.isfinite(logits).all()


def test_quantized_and_listed_layers_in_bfloat16():
    small, large = quantized(PARAMS, SCHEMES["int8"])
    tokens = random_tokens(1, 6, TINY)
    listed = unstack_layers(with_prefix(small, PREFIXED["prefix"]))
    logits, _ = jit_forward(TINY, listed, tokens)
    assert np.abs(logits[0] - torch_logits(TINY, large, tokens[0], K, V)).max() <= TOLERANCE
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PREFIXED)
    logits, _ = jit_forward(TINY, narrow, tokens)
    reference, without = (torch_logits(TINY, PARAMS, tokens[0], *kv) for kv in ((K, V), ()))
    assert np.abs(logits[0] - reference).mean() < np.abs(without - reference).mean() / 5


def test_logn_scaling_goes_by_the_place_behind_the_prefix():
    """With a cache or without; positions alone are far too small to be scaled."""
    config = dataclasses.replace(TINY, logn_scaling=True)
    prefix = jax.tree.map(lambda x: jnp.tile(x, (1, 500, 1, 1)), PREFIXED["prefix"])
    params, tokens = with_prefix(PARAMS, prefix), random_tokens(1, 3, TINY)
    plain, _ = jit_forward(config, params, tokens)
    cache = KVCache.new(config, 1, 3, jnp.float32, prefix)
    cached, _ = jit_forward(config, params, tokens, cache=cache)
    assert np.abs(plain - cached).max() <= TOLERANCE
    unscaled, _ = jit_forward(TINY, params, tokens)
    assert np.abs(plain - unscaled).max() > 10 * TOLERANCE


def test_published_code_logits_and_greedy_tokens(tmp_path):
    raw = json.loads(shared_path("reference/hf_tiny_chatglm2_config.json").read_bytes())
    arrays = dict(np.load(shared_path("reference/hf_tiny_chatglm2_prefix.npz")))
    config = GLMConfig.from_hf(raw)
    weights = {name[3:]: value for name, value in arrays.items() if name.startswith("sd/")}
    write_prefix(tmp_path, {n: x for n, x in weights.items() if "prefix_encoder" in n})
    found = load_prefix(tmp_path, config)
    assert found.length == 5
    params = with_prefix(published_params(config, weights), Prefix(found.k, found.v))
    params = jax.tree.map(jnp.asarray, params)
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    mask = jnp.asarray(arrays["attention_mask"], jnp.int32)
    cache = KVCache.new(config, 2, 16, jnp.float32, params["prefix"])
    logits, cache = jit_forward(config, params, tokens, segment_ids=mask, cache=cache)
    assert np.abs(logits - arrays["logits"])[arrays["attention_mask"] > 0].max() <= TOLERANCE
    expected = arrays["greedy"][:, tokens.shape[1] :]
    answers = greedy(config, params, logits, cache, expected.shape[1])
    np.testing.assert_array_equal(answers, expected)
