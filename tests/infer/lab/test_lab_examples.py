"""The ideas in examples/lab: without effect they are the model, with it what they say."""

import dataclasses
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import KVCache, forward
from glm2_jax.attention import Visibility
from glm2_jax.ideas import Idea, Seen
from glm2_jax.model import unstack_layers
from infer.lab.files import read_ideas
from infer.lab.sample import Sample
from tests.support import toy
from tests.support.paths import ROOT

TOY = dataclasses.replace(toy.TOY, num_layers=2)
STACKED = toy.toy_params(TOY)
PARAMS = unstack_layers(STACKED)
TOKENS = toy.random_tokens(2, 14)


def idea_of(name: str, sample: Any = None, **options) -> Idea:
    given = [(key, str(value)) for key, value in options.items()]
    (file,) = read_ideas([str(ROOT / "examples/lab" / f"{name}.py")], given)
    return file.idea(sample)


def having(idea: Idea, **changes):
    return dataclasses.replace(TOY, idea=idea, **changes)


@cache
def logits(config, layers: tuple[int, ...] | None = None) -> np.ndarray:
    """Of all tokens at once, by the layers of these numbers."""
    params = params_of(config)
    if layers is not None:
        params = {**PARAMS, "layers": [PARAMS["layers"][number] for number in layers]}
    return np.asarray(jax.jit(partial(forward, config))(params, TOKENS)[0])


def params_of(config):
    """Stacked, which compiles faster, but for ideas that run the layers."""
    return STACKED if config.idea.blocks is None else PARAMS


def stepped(config) -> np.ndarray:
    """The same, token by token through the cache."""
    step = jax.jit(lambda params, tokens, cache: forward(config, params, tokens, cache=cache))
    cache, found = KVCache.zeros(config, 2, 16, jnp.float32), []
    for column in range(TOKENS.shape[1]):
        out, cache = step(params_of(config), TOKENS[:, column : column + 1], cache)
        found.append(np.asarray(out))
    return np.concatenate(found, axis=1)


NO_EFFECT = {
    "early_exit": {"threshold": 1.1},
    "window_sinks": {"window": 14},
    "heavy_hitters": {"budget": 14},
    "token_merge": {"threshold": 1.1},
    "topk_attention": {"k": 14},
}
EFFECT = {
    "early_exit": {"threshold": 0.05, "first": 1},
    "window_sinks": {"window": 4, "sinks": 2},
    "heavy_hitters": {"budget": 5, "recent": 2},
    "token_merge": {"threshold": 0.2},
    "topk_attention": {"k": 3},
}


def test_every_file_is_looked_at():
    names = {path.stem for path in (ROOT / "examples/lab").glob("*.py")}
    assert names == {*NO_EFFECT, "layer_skip", "kv_int8", "self_speculative"}
    for name in names:
        lines = (ROOT / "examples/lab" / f"{name}.py").read_text("utf-8").splitlines()
        assert 10 < len(lines) <= 60, name


@pytest.mark.parametrize("name", NO_EFFECT)
def test_without_effect_the_logits_are_those_of_the_model(name):
    found = logits(having(idea_of(name, **NO_EFFECT[name])))
    np.testing.assert_allclose(found, logits(TOY), atol=1e-5)


@pytest.mark.parametrize("name", EFFECT)
def test_cached_is_uncached(name):
    config = having(idea_of(name, **EFFECT[name]))
    found = logits(config)
    assert np.abs(found - logits(TOY)).max() > 1e-2
    np.testing.assert_allclose(stepped(config), found, atol=1e-4)


def test_skipping_layers_is_a_model_without_them():
    idea = idea_of("layer_skip", Sample(TOY, PARAMS, TOKENS), skip=1)
    sample = SimpleNamespace(measure=lambda idea: {"0": 1, "1": 0})
    programs = [
        jax.jit(partial(forward, config)).lower(PARAMS, TOKENS).as_text()
        for config in (TOY, having(idea_of("layer_skip", sample, skip=0)))
    ]
    assert programs[0] == programs[1]
    fewer = dataclasses.replace(TOY, num_layers=1)
    left = [logits(fewer, (layer,)) for layer in range(2)]
    equal = [np.allclose(logits(having(idea)), one, atol=1e-5) for one in left]
    assert sum(equal) == 1


def test_keys_and_values_in_int8_are_a_setting_of_the_cache():
    assert idea_of("kv_int8") == Idea(kv="int8")
    assert idea_of("kv_int8", kv="auto") == Idea(kv="auto")


def test_leaving_early_is_a_model_of_the_first_layers():
    found = logits(having(idea_of("early_exit", threshold=0, first=1)))
    first = logits(dataclasses.replace(TOY, num_layers=1), (0,))
    np.testing.assert_allclose(found, first, atol=1e-5)


B, T, N, K, H = 2, 12, 4, 2, 8


def attended(name: str, **options) -> tuple[np.ndarray, Seen]:
    """What the attention of an idea makes of random vectors, [B, K, G, T, H], and these."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k, v = (jax.random.normal(key, (B, K, T, H)) for key in keys[1:])
    ones = jnp.ones((B, T), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    idea = idea_of(name, **options)
    notes = {name: jnp.zeros((B, K, T)) for name in idea.notes}
    seen = Seen(q, k, v, Visibility(places, ones, ones), 0, notes)
    out = jax.jit(partial(idea.attention, None))(seen)
    out = out[0] if idea.notes else out
    return np.moveaxis(np.asarray(out).reshape(B, T, K, N // K, H), 1, 3), seen


def weighted(seen: Seen, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Plain attention in float64 where a mask that broadcasts to [B, K, G, T, S] is True."""
    q, k, v = (np.asarray(x, np.float64) for x in (seen.q, seen.k, seen.v))
    q = np.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)
    scores = np.where(mask, np.einsum("bkgth,bksh->bkgts", q, k) / np.sqrt(H), -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    return np.einsum("bkgts,bksh->bkgth", probs, v), probs


CAUSAL = np.tril(np.ones((T, T), bool))


def test_the_window_is_a_mask():
    found, seen = attended("window_sinks", window=3, sinks=2)
    t, s = np.mgrid[:T, :T]
    expected, _ = weighted(seen, CAUSAL & ((t - s < 3) | (s < 2)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_largest_scores_alone_are_seen():
    found, seen = attended("topk_attention", k=3)
    _, probs = weighted(seen, CAUSAL)
    third = np.sort(probs, axis=-1)[..., -3:-2]
    expected, _ = weighted(seen, CAUSAL & (probs >= third) & (probs > 0))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_got_least_attention_is_evicted_for_good():
    budget, recent = 5, 2
    found, seen = attended("heavy_hitters", budget=budget, recent=recent)
    kept, score = np.zeros((B, K, T, T), bool), np.zeros((B, K, T))
    for b, k in np.ndindex(B, K):
        alive: list[int] = []
        for t in range(T):
            alive.append(t)
            kept[b, k, t, alive] = True
            _, probs = weighted(seen, kept[:, :, None] | np.eye(T, dtype=bool))
            score[b, k] += probs[b, k, :, t].sum(axis=0)
            if len(alive) > budget:
                alive.remove(min((s for s in alive if s <= t - recent), key=score[b, k].item))
    assert (kept.sum(-1) == np.minimum(np.arange(T) + 1, budget + 1)).all()
    expected, _ = weighted(seen, kept[:, :, None])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_merged_neighbours_are_their_mean_and_count_twice():
    found, seen = attended("token_merge", threshold=0.1)
    k, v = np.asarray(seen.k), np.asarray(seen.v)
    merged = 0
    for b, head, t in np.ndindex(B, K, T):
        keys, values = k[b, head, : t + 1].copy(), v[b, head, : t + 1].copy()
        for one in range(0, t, 2):
            pair = keys[one : one + 2]
            if pair[0] @ pair[1] > 0.1 * np.prod(np.linalg.norm(pair, axis=1)):
                keys[one : one + 2], values[one : one + 2] = (
                    pair.mean(0),
                    values[one : one + 2].mean(0),
                )
                merged += 1
        q = np.asarray(seen.q).reshape(B, T, K, N // K, H)[b, t, head]
        weights = np.exp(q @ keys.T / np.sqrt(H))
        expected = weights @ values / weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(found[b, head, :, t], expected, atol=1e-5)
    assert merged > 10
