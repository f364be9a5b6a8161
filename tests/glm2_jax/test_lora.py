"""Adapters: what a new one leaves alone, and what a trained one does."""

import dataclasses
import functools
import os
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
from glm2_jax.choices import REMAT
from glm2_jax.lora import (
    GROUPS,
    TARGETS,
    LoRA,
    adapt,
    choose_adapters,
    find_targets,
    join_adapters,
    layer_of,
    scale_of,
    with_lora,
)
from glm2_jax.model import unstack_layers
from glm2_jax.schemes import SCHEMES
from tests.support.toy import TOY as THREE_LAYERS
from tests.support.toy import jit_forward, quantized, random_tokens, toy_params

TOY = dataclasses.replace(THREE_LAYERS, num_layers=2)
TOKENS, KEY = random_tokens(2, 8), jax.random.key(3)
ALL = "all-linear"
OPTIONS = compiler_options("cpu")
EMITTERS = "xla_cpu_use_fusion_emitters"
# Fusions as users have them: bits are compared.
AS_USERS = OPTIONS | ({EMITTERS: True} if EMITTERS in os.environ.get("XLA_FLAGS", "") else {})
jit_last = jax.jit(last_logits, static_argnums=0, compiler_options=AS_USERS)
jit_hidden = jax.jit(hidden, static_argnums=0, static_argnames="remat", compiler_options=OPTIONS)


@functools.cache
def new_lora(targets: str = ALL, **kwargs) -> LoRA:
    return init_lora(TOY, jax.random.key(5), rank=4, alpha=8, targets=targets, **kwargs)


@functools.cache
def trained(targets: str = ALL, **kwargs) -> LoRA:
    """An adapter whose B is random, too; large enough to change greedy tokens."""
    random = np.random.default_rng(7)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.2, x.shape), x.dtype), new_lora(targets, **kwargs)
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
    """The base in a dtype or a scheme, as listed layers where the form says so."""
    kind, _, listed = form.partition(" ")
    params = toy_params(TOY)
    if kind in SCHEMES:
        params = quantized(params, SCHEMES[kind])[0]
    else:
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, kind)), params)
    return unstack_layers(params) if listed else params


def steps(params, lora: LoRA | None = None):
    """Logits of a prompt that is read into a cache, and of a step after it: [2, V]."""
    cache = KVCache.zeros(TOY, 1, 8, jnp.float32)
    zero = jnp.zeros(1, jnp.int32)
    first, cache = jit_last(TOY, params, TOKENS[:1, :6], zero + 5, cache=cache, lora=lora)
    second, _ = jit_last(TOY, params, TOKENS[:1, 6:7], zero, cache=cache, lora=lora)
    return np.concatenate([first, second])


@pytest.mark.parametrize("form", ["float32 list", "bfloat16", "int8 list", "int4"])
def test_a_new_adapter_changes_no_bit(form):
    plain = steps(base_of(form))
    np.testing.assert_array_equal(steps(base_of(form), new_lora()), plain)
    assert np.abs(steps(base_of(form), trained()) - plain).max() > 0.1, "or it could not fail"


def test_an_adapter_is_its_merged_base():
    base, plain = base_of("float32 list"), steps(base_of("float32 list"))
    for target in [*TARGETS, ALL]:  # the B of all others is 0
        layers = {
            name: weights if target in (name, ALL) else new_lora().layers[name]
            for name, weights in trained().layers.items()
        }
        lora = dataclasses.replace(trained(), layers=layers)
        adapted = steps(base, lora)
        expected = steps(unstack_layers(merged(toy_params(TOY), lora)))
        np.testing.assert_allclose(adapted, expected, atol=1e-4)
        assert np.abs(adapted - plain).max() > 0.05, target
    large = quantized(toy_params(TOY), SCHEMES["int4"])[1]
    expected = steps(unstack_layers(merged(large, trained())))
    np.testing.assert_allclose(steps(base_of("int4"), trained()), expected, atol=1e-4)
    inside = with_lora(base_of("int4"), trained())
    np.testing.assert_array_equal(steps(inside), steps(base_of("int4"), trained()))


def test_the_plain_program_knows_nothing_of_adapters():
    def program(lora: LoRA | None, params=None, **kwargs) -> str:
        params = params or toy_params(TOY)
        return jit_forward.lower(TOY, params, TOKENS, lora=lora, **kwargs).as_text()

    inside = with_lora(toy_params(TOY), new_lora(ALL))
    for cache in (None, KVCache.zeros(TOY, 2, 9, jnp.float32)):
        # q, k, v, scores, sums of values, o, gate and up, down; and the head.
        for lora, more in ((None, 0), (new_lora("attn"), 4), (new_lora(ALL), 4 + 2 + 2 + 2)):
            text = program(lora, cache=cache)
            assert len(re.findall(r"stablehlo\.dot_general", text)) == 9 + more
    # An adapter that is given replaces one that the params bring along.
    assert len(re.findall("dot_general", program(new_lora("attn"), inside))) == 9 + 4
    assert program(None) == program(LoRA({}, new_lora().scale))
    dropping = new_lora(ALL, dropout=0.5)
    assert program(new_lora()) == program(dropping) != program(dropping, dropout_key=KEY)


def test_targets_and_their_shapes():
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
    assert np.abs(a).max() <= bound and abs(a.mean()) < 0.02 * bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert len({layer.tobytes() for layer in a}) == 8, "every layer has its own"
    assert lora.scale == {"query_key_value": 2.0} and scale_of(32, 16, rslora=True) == 8.0
    other = init_lora(config, jax.random.key(1), rank=16)
    assert np.any(np.asarray(other.layers["query_key_value"]["a"]) != a)


@pytest.mark.parametrize(
    "wrong", [{"targets": "attn,output_layer"}, {"targets": []}, {"rank": 0}, {"dropout": 1.0}]
)
def test_what_makes_no_adapter_is_refused(wrong):
    with pytest.raises(UsageError) as error:
        init_lora(TOY, KEY, **wrong)
    for name in (*TARGETS, *GROUPS) if "targets" in wrong else wrong:
        assert name in str(error.value)


def test_hidden_and_its_logits_are_the_forward():
    """Also of packed rows, an adapter, noise on the embeddings, and recomputed blocks."""
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8], np.int32)
    positions = np.tile(np.arange(8, dtype=np.int32) // 2, (2, 1))
    params, noise = toy_params(TOY), np.random.default_rng(0).normal(0, 0.1, (2, 8, 48))
    kwargs = {"lora": trained(), "segment_ids": segments, "positions": positions}
    embedded = np.zeros_like(params["embed"])
    embedded[:16] = (np.asarray(params["embed"])[TOKENS] + noise).reshape(16, 48)
    numbers = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    expected, _ = jit_forward(TOY, {**params, "embed": embedded}, numbers, **kwargs)
    jit_logits = jax.jit(logits_of, static_argnums=0)
    for form, remat in ((params, "none"), (unstack_layers(params), "full")):
        x = jit_hidden(TOY, form, TOKENS, noise=noise.astype(np.float32), remat=remat, **kwargs)
        parts = [jit_logits(TOY, params, part) for part in np.split(x, 2, axis=1)]
        found = np.concatenate(parts, axis=1)[segments > 0]
        np.testing.assert_allclose(found, expected[segments > 0], atol=1e-4)


def loss(lora, params, remat="none"):
    x = hidden(TOY, params, TOKENS, lora=lora, remat=remat)
    return jnp.mean(jax.nn.logsumexp(logits_of(TOY, params, x), axis=-1))


@pytest.mark.parametrize(("form", "remats"), [("int8", REMAT), ("bfloat16 list", (True,))])
def test_gradients_of_the_adapter_alone(form, remats):
    jit_grad = jax.jit(jax.grad(loss), static_argnames="remat", compiler_options=OPTIONS)
    found = [jit_grad(trained(), base_of(form), remat=remat) for remat in remats]
    assert isinstance(found[0], LoRA) and found[0].scale == trained().scale
    for one, x, *others in zip(*map(jax.tree.leaves, (found[0], trained(), *found)), strict=True):
        assert (one.shape, one.dtype) == (x.shape, jnp.float32)
        for other in others:
            np.testing.assert_allclose(one, other, atol=1e-6)
        largest = np.abs(np.asarray(one)).max(axis=tuple(range(1, one.ndim)))
        assert largest.min() > 0, "in every layer"
    # With B = 0 nothing reaches A; PEFT's first step is the same.
    for weights in jit_grad(new_lora(), base_of(form), remat=remats[0]).layers.values():
        assert not np.any(weights["a"])
        assert all(np.any(x) for part, x in weights.items() if part != "a")


@pytest.mark.parametrize("form", ["float32", "float32 list"])
def test_dropout_goes_by_its_key(form):
    def training(key):
        lora = trained(ALL, dropout=0.5)
        return np.asarray(jit_forward(TOY, base_of(form), TOKENS, lora=lora, dropout_key=key)[0])

    one = training(KEY)
    np.testing.assert_array_equal(one, training(KEY))
    plain = np.asarray(jit_forward(TOY, base_of("float32"), TOKENS, lora=trained())[0])
    for other in (training(jax.random.key(4)), plain):
        assert np.abs(one - other).max() > 0.05


def test_dropout_is_of_what_the_adapter_reads():
    """A new adapter adds nothing, whatever is dropped: the base never sees the dropout; a trained
    one is right on average."""
    target = "dense_4h_to_h"
    scale = new_lora(target).scale.copy({target: 0.01})
    new, small = (LoRA(lora(target).layers, scale, 0.1) for lora in (new_lora, trained))
    params = toy_params(TOY)

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def run(lora, keys):
        def one(key):
            return forward(TOY, params, TOKENS, lora=lora, dropout_key=key)[0]

        return jax.vmap(one)(keys)

    keys = jax.random.split(jax.random.key(1), 64)
    dropped = run(new, keys)
    np.testing.assert_array_equal(dropped, np.broadcast_to(dropped[:1], dropped.shape))
    whole = jit_forward(TOY, merged(params, small), TOKENS)[0] - dropped[0]
    mean = run(small, keys).mean(0) - dropped[0]
    assert np.linalg.norm(mean - whole) < 0.3 * np.linalg.norm(whole)


def test_blocks_of_a_long_text_drop_elements_of_their_own(monkeypatch):
    """Equal columns in different blocks of the MLP do not lose the same elements."""
    monkeypatch.setattr("glm2_jax.model.MLP_ELEMENTS", 2 * 2 * 80)  # two columns
    params = toy_params(TOY)
    params = {**params, "layers": {**params["layers"], "o": 0 * params["layers"]["o"]}}
    lora = trained("dense_h_to_4h").replace(dropout=0.5)
    same = jnp.full((1, 5), 9, jnp.int32)  # without attention every column is the same
    found = np.asarray(jit_hidden(TOY, params, same, lora=lora, dropout_key=KEY))[0]
    assert min(np.abs(found[i] - found[j]).max() for i in range(5) for j in range(i)) > 0.01


def test_a_column_drops_the_same_in_any_block_and_among_any_rows():
    lora = dataclasses.replace(layer_of(trained("dense_h_to_4h"), 0), dropout=0.5)
    x = np.random.default_rng(1).normal(size=(3, 6, 48)).astype(np.float32)

    def added(rows: int, columns: slice, lora=lora):
        numbers = np.arange(6)[columns]
        return adapt(lora, "dense_h_to_4h", x[:rows, columns], KEY, numbers)("b")

    whole = added(3, slice(6))
    for rows, columns in ((3, slice(2, 5)), (2, slice(1)), (1, slice(6))):
        np.testing.assert_allclose(added(rows, columns), whole[:rows, columns], atol=1e-5)
    assert np.abs(whole - added(3, slice(6), lora.replace(dropout=0.0))).max() > 0.1


@pytest.mark.parametrize("form", ["stacked", "list"])
def test_every_row_has_the_adapter_of_its_number(form):
    """Of different ranks, scales and targets; 0 is the base model."""
    params = toy_params(TOY)
    params = unstack_layers(params) if form == "list" else params
    ones = [
        init_lora(TOY, KEY, rank=2, alpha=4, targets="all-linear"),
        init_lora(TOY, jax.random.key(4), rank=3, alpha=30, targets="attn"),
    ]
    trained = [jax.tree.map(lambda x: x + 0.1, one) for one in ones]
    tokens = random_tokens(4, 8)
    want = jnp.stack(
        [
            jit_forward(TOY, params, tokens, lora=lora)[0][row]
            for row, lora in enumerate((None, *trained, trained[0]))
        ]
    )
    chosen = choose_adapters(join_adapters(trained), jnp.array([0, 1, 2, 1]))
    got, _ = jit_forward(TOY, params, tokens, lora=chosen)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert float(jnp.abs(want[0] - want[1]).max()) > 0.01
