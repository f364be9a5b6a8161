"""Attention over blocks: the numbers of the plain form, in bounded memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import KVCache, attention, flash, forms, forward, model
from glm2_jax.attention import ATTENTION, Visibility, attend, candidates
from glm2_jax.forms import Attention, Forms
from tests.support.toy import TOY, random_tokens, toy_params

B, T, S, N, K, H = 2, 13, 29, 4, 2, 8


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def full_row(length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(length, dtype=np.int32), (B, length))


PACKED = [[1] * 5 + [2] + [3] * 7, [1] * 3 + [0] * 10]
# The queries' places, their segments, and the keys' segments.
CASES = {
    "causal": (full_row(T), np.ones((B, T)), np.ones((B, T))),
    "packed and padded": (full_row(T), PACKED, PACKED),
    "cache": (
        full_row(T) + np.array([[3], [16]]),
        np.ones((B, T)),
        np.arange(S) < np.array([[16], [29]]),
    ),
}


def use_small_blocks(monkeypatch) -> None:
    """Blocks of 5 keys, 3 queries and 3 tokens, which divide nothing evenly."""
    monkeypatch.setattr(attention, "SCORES", 3 * B * N * 5)
    monkeypatch.setattr(attention, "KEYS", 5)
    monkeypatch.setattr(model, "MLP_ELEMENTS", 3 * B * 2 * TOY.ffn_hidden_size)


def arguments(name: str):
    visible = Visibility(*(jnp.asarray(x, jnp.int32) for x in CASES[name]))
    kv = (B, K, visible.key_segments.shape[1], H)
    return random(0, B, T, N, H), random(1, *kv), random(2, *kv), visible


@pytest.mark.parametrize("name", CASES)
def test_blocks_have_the_values_and_gradients_of_the_plain_form(name, monkeypatch):
    given = arguments(name)

    def both():
        def loss(q, k, v, visible):
            """A scalar of what the queries that see something get."""
            out = attend(q, k, v, visible) * (visible.segments > 0)[..., None, None]
            return (out * random(3, *out.shape)).sum(), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*given)

    plain = both()
    use_small_blocks(monkeypatch)
    blocks = both()
    for ours, reference in zip(jax.tree.leaves(blocks), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5, rtol=1e-5)


def test_gradients_in_bfloat16():
    """XLA:CPU of jax 0.10 refuses some products in bfloat16, only when they run."""
    q, k, v, visible = arguments("causal")

    def gradients(dtype):
        def loss(q, k, v):
            return (attend(q, k, v, visible).astype(jnp.float32) * random(3, B, T, N, H)).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*(x.astype(dtype) for x in (q, k, v)))

    for half, full in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert jnp.linalg.norm(half - full) < 0.02 * jnp.linalg.norm(full)


def test_unseen_keys_may_hold_anything(monkeypatch):
    q, k, v, visible = arguments("cache")
    k = jnp.where(visible.key_segments[:, None, :, None] > 0, k, jnp.nan)
    plain = attend(q, k, v, visible)
    nothing = visible.replace(segments=jnp.zeros_like(visible.segments))
    use_small_blocks(monkeypatch)
    np.testing.assert_allclose(attend(q, k, v, visible), plain, atol=1e-5)
    assert jnp.isfinite(attend(q, k, v, nothing)).all()


def test_a_model_in_blocks_gives_the_same_logits(monkeypatch):
    config, params = dataclasses.replace(TOY, logn_scaling=True), toy_params()
    segments = jnp.asarray(PACKED, jnp.int32)

    def run(cache):
        def fresh(cache):  # traced again: it reads the sizes of blocks
            tokens = random_tokens(B, T)
            return forward(config, params, tokens, cache=cache, segment_ids=segments)[0]

        return jax.jit(fresh)(cache)[segments > 0]

    continued = KVCache.zeros(TOY, B, S, jnp.float32)
    three = jnp.full(B, 3, jnp.int32)
    continued = continued.replace(k=random(4, *continued.k.shape), length=three, prefix=three)
    references = [run(cache) for cache in (None, continued)]
    use_small_blocks(monkeypatch)
    for cache, logits in zip((None, continued), references, strict=True):
        ours = run(cache)
        np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=0)
        assert (ours.argmax(-1) == logits.argmax(-1)).all()


def temporaries(slots: int, queries: int = 64) -> int:
    """Bytes that attention of a chunk of queries needs besides its arguments and result."""
    q = jax.ShapeDtypeStruct((1, queries, N, H), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, K, slots, H), jnp.float32)
    places, keys = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (queries, slots))
    compiled = jax.jit(attend).lower(q, kv, kv, Visibility(places, places, keys)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_cache(monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 2**15)
    monkeypatch.setattr(attention, "KEYS", 128)
    small, large = temporaries(1024), temporaries(16 * 1024)
    assert large < 1.1 * small < 1.1 * 4 * 2**15 * 4
    assert temporaries(16 * 1024, 1024) < 2 * large + 4 * 1024 * N * H * 4


@pytest.mark.parametrize("case", CASES)
def test_other_forms_have_the_values_of_the_plain_one(case):
    """Of 16 or 32 keys, the first two of which all queries see, and NaN where none sees one."""
    q, k, v, visible = arguments(case)
    more = [(0, 0), (0, 0), (0, -k.shape[2] % 16), (0, 0)]
    keys = jnp.pad(visible.key_segments, more[1:3])
    visible = visible.replace(key_segments=keys, prefix=2)
    k, v = jnp.pad(k, more), jnp.pad(v, more)
    k = jnp.where(keys[:, None, :, None] > 0, k, jnp.nan)
    plain, *others = (
        jax.jit(form)(q, k, v, visible) for form in (attend, ATTENTION["xla"], ATTENTION["parts"])
    )
    for ours in others:
        assert jnp.isfinite(ours).all()
        np.testing.assert_allclose(
            ours[visible.segments > 0], plain[visible.segments > 0], atol=1e-5
        )


@pytest.mark.parametrize("kernel", [flash.triton, flash.splash])
def test_a_kernel_has_the_values_and_gradients_of_the_plain_form(kernel):
    """Of a packed and padded text, whose padding has NaN as keys; kernels are interpreted."""
    length, width = 150, 128
    segments = jnp.asarray([[1] * 70 + [2] * 50 + [0] * 30], jnp.int32)
    places = jnp.arange(length, dtype=jnp.int32)[None]
    visible = Visibility(places, segments, segments, whole=True)
    q, k, v, weight = (
        random(seed, 1, *shape, width)
        for seed, shape in enumerate([(length, N), (K, length), (K, length), (length, N)])
    )
    real = (segments > 0)[..., None, None]

    def both(form, padding, *more):
        def loss(q, k, v):
            k = jnp.where(real[:, None, :, 0], k, padding)
            out = jnp.where(real, form(q, k, v, visible, *more), 0)
            return (out * weight).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    ours, plain = both(kernel, jnp.nan, True), both(attend, 0)
    for mine, reference in zip(*map(jax.tree.leaves, (ours, plain)), strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-4, rtol=1e-4)


def test_forms_are_for_their_platform_and_case():
    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
    part, one, whole = Attention(512, 1024), Attention(1, 1024), Attention(512, 512, whole=True)
    cases = [("gpu", half, part), ("gpu", half, whole), ("tpu", half, whole), ("tpu", half, part)]
    assert [candidates(*case) for case in cases] == [
        ["xla", "cudnn"], ["xla", "cudnn", "triton"], ["xla", "splash"], ["xla"]
    ]  # fmt: skip
    assert candidates("gpu", single, whole) == ["xla"]
    assert candidates("cpu", single, one) == ["xla", "parts"]
    chosen = Forms(attention=((part, "cudnn"), (whole, None)))
    assert chosen.of_attention(Attention(64, 64)) == "cudnn"
    assert chosen.of_attention(Attention(64, 64, whole=True)) is None
    assert chosen.describe() == "attention of 512 to 1024: cudnn"
    assert Forms(attention=((part, "xla"),)).of_attention(whole) == "xla"
    assert Forms(attention=((whole, "splash"),)).of_attention(part) is None


def test_a_form_that_would_write_too_many_scores_gives_way(monkeypatch):
    given, scores = arguments("cache"), B * N * T * S
    monkeypatch.setitem(ATTENTION, "xla", lambda q, *others: 0 * q)
    with forms.using(Forms(attention=((Attention(T, S), "xla"),))):
        monkeypatch.setattr(attention, "SCORES", scores)
        assert not attend(*given).any()
        monkeypatch.setattr(attention, "SCORES", scores - 1)
        assert attend(*given).any()
