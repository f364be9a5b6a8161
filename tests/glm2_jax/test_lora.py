"""Adapters in the model: what a new one leaves alone, and what a trained one does."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import (
    PRESETS,
    KVCache,
    UsageError,
    compiler_options,
    forward,
    hidden,
    init_lora,
    last_logits,
    logits_of,
)
from glm2_jax.lora import (
    GROUPS,
    TARGETS,
    LoRA,
    adapt,
    find_targets,
    layer_of,
    scale_of,
    with_lora,
)
from glm2_jax.model import unstack_layers
from glm2_jax.schemes import SCHEMES
from tests.support import hurry
from tests.support.toy import TOY as THREE_LAYERS
from tests.support.toy import abstract_params, quantized, random_tokens, toy_params

TOY = dataclasses.replace(THREE_LAYERS, num_layers=2)
ALL = "all-linear"
# As users have them compiled: bits are compared.
jit_forward = jax.jit(forward, static_argnums=0, compiler_options=compiler_options("cpu"))
jit_last = jax.jit(last_logits, static_argnums=0, compiler_options=compiler_options("cpu"))
jit_hidden = jax.jit(hidden, static_argnums=0, static_argnames="remat")
jit_logits_of = jax.jit(logits_of, static_argnums=0)


@functools.cache
def new_lora(targets: str = ALL, **kwargs) -> LoRA:
    return init_lora(TOY, jax.random.key(5), rank=4, alpha=8, targets=targets, **kwargs)


@functools.cache
def trained(targets: str = ALL, seed: int = 7) -> LoRA:
    """An adapter whose B is random, too; large enough to change greedy tokens."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.2, x.shape), x.dtype), new_lora(targets)
    )


def merged(params, lora: LoRA):
    """The base with scale * B A added to its matrices, in float64."""
    layers = {name: np.asarray(x, np.float64) for name, x in params["layers"].items()}
    products = {
        "q": ("query_key_value", "lnhr,lrd->lnhd", "q"),
        "k": ("query_key_value", "lkhr,lrd->lkhd", "k"),
        "v": ("query_key_value", "lkhr,lrd->lkhd", "v"),
        "o": ("dense", "ldr,lrnh->ldnh", "b"),
        "gate_up": ("dense_h_to_4h", "lcfr,lrd->lcfd", "b"),
        "down": ("dense_4h_to_h", "ldr,lrf->ldf", "b"),
    }
    for name, (target, spec, part) in products.items():
        if target in lora.layers:
            a, b = (np.asarray(lora.layers[target][x], np.float64) for x in ("a", part))
            layers[name] = layers[name] + lora.scale[target] * np.einsum(spec, b, a)
    layers = {name: jnp.asarray(x, jnp.float32) for name, x in layers.items()}
    return {**params, "layers": layers}


@functools.cache
def base_of(form: str):
    params = toy_params(TOY)
    if form in SCHEMES:
        return quantized(params, SCHEMES[form])[0]
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, form)), params)


def layers_as(form: str, params):
    return unstack_layers(params) if form == "list" else params


def logits(params, lora: LoRA | None):
    return np.asarray(jit_forward(TOY, params, random_tokens(2, 6), lora=lora)[0])


def steps(params, lora: LoRA | None):
    """Logits of a prompt that is read into a cache, and of a step after it: [2, B, V]."""
    cache = KVCache.zeros(TOY, 2, 8, jnp.float32)
    prompt, token = random_tokens(2, 6), random_tokens(2, 1, seed=3)
    first, cache = jit_last(TOY, params, prompt, jnp.array([5, 3]), cache=cache, lora=lora)
    second, _ = jit_last(TOY, params, token, jnp.zeros(2, jnp.int32), cache=cache, lora=lora)
    return np.stack([first, second])


@pytest.mark.parametrize(
    ("form", "layers"),
    [("float32", "list"), ("bfloat16", "stacked"), ("int8", "list"), ("int4", "stacked")],
)
def test_a_new_adapter_changes_no_bit(form, layers):
    params = layers_as(layers, base_of(form))
    plain = logits(params, None)
    np.testing.assert_array_equal(logits(params, new_lora()), plain)
    np.testing.assert_array_equal(steps(params, new_lora()), steps(params, None))
    assert np.abs(logits(params, trained()) - plain).max() > 0.1, "or the test could not fail"


@pytest.mark.parametrize("targets", [*TARGETS, ALL])
def test_an_adapter_is_its_merged_base(targets):
    lora = trained(targets)
    adapted, expected = logits(toy_params(TOY), lora), logits(merged(toy_params(TOY), lora), None)
    np.testing.assert_allclose(adapted, expected, atol=1e-4)
    assert np.abs(adapted - logits(toy_params(TOY), None)).max() > 0.05


def test_an_adapter_answers_step_by_step():
    expected = steps(merged(toy_params(TOY), trained()), None)
    for layers in ("stacked", "list"):
        adapted = steps(layers_as(layers, toy_params(TOY)), trained())
        np.testing.assert_allclose(adapted, expected, atol=1e-4)


def test_a_quantized_base_takes_an_adapter():
    small, large = quantized(toy_params(TOY), SCHEMES["int4"])
    expected = logits(merged(large, trained()), None)
    np.testing.assert_allclose(logits(small, trained()), expected, atol=1e-4)


def products(lora: LoRA | None, cached: bool) -> int:
    """Matrix products in the program of a forward pass; the layers' are scanned, and count once."""
    cache = KVCache.zeros(TOY, 2, 9, jnp.float32) if cached else None
    text = jit_forward.lower(TOY, toy_params(TOY), random_tokens(2, 6), cache=cache, lora=lora)
    return len(re.findall(r"stablehlo\.dot_general", text.as_text()))


def test_the_plain_program_knows_nothing_of_adapters():
    """q, k, v, scores, sums of values, o, gate and up, down; and the head."""
    for cached in (False, True):
        assert products(None, cached) == 9
        assert products(new_lora("attn"), cached) == 9 + 4
        assert products(new_lora(ALL), cached) == 9 + 4 + 2 + 2 + 2
    nothing = LoRA({}, new_lora().scale)
    texts = [
        jit_forward.lower(TOY, toy_params(TOY), random_tokens(2, 6), lora=lora).as_text()
        for lora in (None, nothing)
    ]
    assert texts[0] == texts[1]


def test_a_fused_matrix_and_names():
    assert find_targets("attn") == ("query_key_value",)
    assert find_targets(["dense_4h_to_h", "attn", "attn"]) == ("query_key_value", "dense_4h_to_h")
    assert find_targets(" dense , attn+mlp") == find_targets(ALL) == tuple(TARGETS)
    L, D, F, N, K, H, R = 2, 48, 80, 4, 2, 16, 4
    fused = {"a": (L, R, D), "q": (L, N, H, R), "k": (L, K, H, R), "v": (L, K, H, R)}
    assert jax.tree.map(lambda x: x.shape, new_lora().layers) == {
        "query_key_value": fused,
        "dense": {"a": (L, R, N, H), "b": (L, D, R)},
        "dense_h_to_4h": {"a": (L, R, D), "b": (L, 2, F, R)},
        "dense_4h_to_h": {"a": (L, R, F), "b": (L, D, R)},
    }
    config = PRESETS["chatglm2-6b"]  # and the published number of parameters
    lora = jax.eval_shape(lambda: init_lora(config, jax.random.key(0), rank=8, targets="attn"))
    assert lora.num_params == 1_949_696


def test_a_new_adapter_is_drawn_as_peft_draws_it():
    config = dataclasses.replace(TOY, num_layers=8, hidden_size=512)
    lora = init_lora(config, jax.random.key(0), rank=16, alpha=32, targets="attn", dropout=0.1)
    weights = lora.layers["query_key_value"]
    assert not any(np.any(weights[part]) for part in "qkv")
    a = np.asarray(weights["a"])
    assert a.dtype == np.float32 and lora.dropout == 0.1
    bound = 512**-0.5  # uniform: its deviation is bound / sqrt(3)
    assert np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert abs(a.mean()) < 0.02 * bound
    assert len({layer.tobytes() for layer in a}) == 8, "every layer has its own"
    assert lora.scale == {"query_key_value": 2.0}
    assert scale_of(32, 16, rslora=True) == 8.0
    other = init_lora(config, jax.random.key(1), rank=16, alpha=32)
    assert np.any(np.asarray(other.layers["query_key_value"]["a"]) != a)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"targets": targets} for targets in ("q_proj", "attn,output_layer", "", [])),
        *({"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}),
    ],
)
def test_what_makes_no_adapter_is_refused(wrong):
    with pytest.raises(UsageError) as error:
        init_lora(TOY, jax.random.key(0), **wrong)
    for name in (*TARGETS, *GROUPS) if "targets" in wrong else wrong:
        assert name in str(error.value)


@pytest.mark.parametrize(("layers", "remat"), [("stacked", False), ("list", True)])
def test_hidden_and_its_logits_are_the_forward(layers, remat):
    params = layers_as(layers, toy_params(TOY))
    tokens = random_tokens(2, 8)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8], np.int32)
    positions = np.tile(np.arange(8, dtype=np.int32) // 2, (2, 1))
    where = {"segment_ids": segments, "positions": positions}
    x = jit_hidden(TOY, params, tokens, lora=trained(), remat=remat, **where)
    assert x.shape == (2, 8, 48)
    expected, _ = jit_forward(TOY, params, tokens, lora=trained(), **where)
    parts = [jit_logits_of(TOY, params, part) for part in np.split(x, [3], axis=1)]
    real = segments > 0
    found, expected = np.concatenate(parts, 1), np.asarray(expected)
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)


def loss(lora, params, remat=False, dropout_key=None):
    x = hidden(TOY, params, random_tokens(2, 8), lora=lora, remat=remat, dropout_key=dropout_key)
    return jnp.mean(jax.nn.logsumexp(logits_of(TOY, params, x), axis=-1))


in_a_hurry = compiler_options("cpu") | hurry.OPTIONS
jit_grad = jax.jit(jax.grad(loss), static_argnames="remat", compiler_options=in_a_hurry)


@pytest.mark.parametrize(
    ("form", "layers"),
    [("bfloat16", "list"), ("int8", "stacked")],
)
def test_gradients_of_the_adapter_alone(form, layers):
    params = layers_as(layers, base_of(form))
    lora = trained()
    grads = jit_grad(lora, params)
    again = jit_grad(lora, params, remat=True)
    assert isinstance(grads, LoRA) and grads.scale == lora.scale
    for one, other, x in zip(*map(jax.tree.leaves, (grads, again, lora)), strict=True):
        assert (one.shape, one.dtype) == (x.shape, jnp.float32)
        np.testing.assert_allclose(one, other, atol=1e-6 if form != "bfloat16" else 1e-3)
        largest = np.abs(np.asarray(one)).max(axis=tuple(range(1, one.ndim)))
        assert largest.min() > 0, "in every layer"


def test_a_new_adapter_learns_b_first():
    """With B = 0 nothing reaches A; PEFT's first step is the same."""
    grads = jit_grad(new_lora(), toy_params(TOY))
    for weights in grads.layers.values():
        assert not np.any(weights["a"])
        assert all(np.any(x) for part, x in weights.items() if part != "a")


@pytest.mark.parametrize("layers", ["stacked", "list"])
def test_dropout_needs_a_key_and_a_rate(layers):
    params = layers_as(layers, toy_params(TOY))
    tokens, key = random_tokens(2, 8), jax.random.key(3)
    lora = trained()
    dropping = lora.replace(dropout=0.5)

    def training(lora, key):
        return np.asarray(jit_forward(TOY, params, tokens, lora=lora, dropout_key=key)[0])

    plain = training(lora, None)
    np.testing.assert_array_equal(training(dropping, None), plain)
    np.testing.assert_allclose(training(lora, key), plain, atol=1e-5)
    one, other = training(dropping, key), training(dropping, jax.random.key(4))
    np.testing.assert_array_equal(one, training(dropping, key))
    assert np.abs(one - plain).max() > 0.05 and np.abs(one - other).max() > 0.05


@pytest.mark.parametrize("target", ["query_key_value", "dense_4h_to_h"])
def test_dropout_is_of_what_the_adapter_reads(target):
    """A new adapter adds nothing, whatever is dropped: the base never sees the dropout; a trained
    one is right on average."""
    params, tokens = toy_params(TOY), random_tokens(2, 8)
    plain = jit_forward(TOY, params, tokens)[0]
    new = new_lora(target, dropout=0.5)
    dropped = jit_forward(TOY, params, tokens, lora=new, dropout_key=jax.random.key(0))[0]
    np.testing.assert_array_equal(dropped, plain)
    lora = trained(target)
    small = LoRA(lora.layers, lora.scale.copy({target: 0.01}), 0.1)
    run = jax.jit(
        jax.vmap(lambda key: forward(TOY, params, tokens, lora=small, dropout_key=key)[0])
    )
    mean = run(jax.random.split(jax.random.key(1), 64)).mean(0) - plain
    whole = jit_forward(TOY, params, tokens, lora=small)[0] - plain
    assert np.linalg.norm(mean - whole) < 0.3 * np.linalg.norm(whole)


def test_blocks_of_a_long_text_drop_elements_of_their_own(monkeypatch):
    """Equal columns in different blocks of the MLP do not lose the same elements."""
    monkeypatch.setattr("glm2_jax.model.MLP_ELEMENTS", 2 * 2 * 80)  # two columns
    params = toy_params(TOY)
    params = {**params, "layers": {**params["layers"], "o": 0 * params["layers"]["o"]}}
    lora = trained("dense_h_to_4h").replace(dropout=0.5)
    same = jnp.full((1, 5), 9, jnp.int32)  # without attention every column is the same

    def columns(key):
        return np.asarray(jit_hidden(TOY, params, same, lora=lora, dropout_key=key))[0]

    assert len({row.tobytes() for row in columns(None)}) == 1
    found = columns(jax.random.key(0))
    distances = [np.abs(found[i] - found[j]).max() for i in range(5) for j in range(i)]
    assert min(distances) > 0.01


def test_a_column_drops_the_same_in_any_block_and_among_any_rows():
    lora = dataclasses.replace(layer_of(trained("dense_h_to_4h"), 0), dropout=0.5)
    x = np.random.default_rng(1).normal(size=(3, 6, 48)).astype(np.float32)
    numbers, key = np.arange(6), jax.random.key(2)

    @jax.jit
    def read(x, numbers):
        return adapt(lora, "dense_h_to_4h", x, key, numbers)("b")

    def added(rows: slice, columns: slice):
        return np.asarray(read(x[rows, columns], numbers[columns]))

    whole = added(slice(3), slice(6))
    for rows, columns in ((slice(3), slice(2, 5)), (slice(2), slice(1)), (slice(1), slice(6))):
        np.testing.assert_allclose(added(rows, columns), whole[rows, columns], atol=1e-5)
    kept = adapt(dataclasses.replace(lora, dropout=0.0), "dense_h_to_4h", x, key)("b")
    assert np.abs(whole - kept).max() > 0.1


def test_noise_goes_to_the_embeddings():
    params, tokens = toy_params(TOY), random_tokens(2, 8)
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 8, 48)).astype(np.float32)
    embedded = np.zeros_like(params["embed"])
    embedded[:16] = (np.asarray(params["embed"])[tokens] + noise).reshape(16, 48)
    numbers = np.arange(16, dtype=np.int32).reshape(2, 8)
    expected = jit_hidden(TOY, {**params, "embed": embedded}, numbers)
    for layers in (params, unstack_layers(params)):
        x = jit_hidden(TOY, layers, tokens, noise=noise)
        np.testing.assert_allclose(x, expected, atol=1e-5)


def test_params_may_bring_their_adapter_along():
    params = with_lora(toy_params(TOY), trained())
    np.testing.assert_array_equal(logits(params, None), logits(toy_params(TOY), trained()))
    other = logits(params, trained(seed=8))
    np.testing.assert_array_equal(other, logits(toy_params(TOY), trained(seed=8)))


def test_remat_keeps_less():
    """What the backward pass needs of the forward pass, in bytes."""
    config = dataclasses.replace(TOY, num_layers=6)
    params, tokens = abstract_params(config), random_tokens(2, 64, config)
    lora = jax.eval_shape(lambda: init_lora(config, jax.random.key(0), rank=4, targets="attn"))

    def temporaries(remat: bool) -> int:
        def loss(lora, params):
            return hidden(config, params, tokens, lora=lora, remat=remat).sum()

        options = compiler_options("cpu")
        program = jax.jit(jax.grad(loss), compiler_options=options).lower(lora, params).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(True) < 0.5 * temporaries(False)
