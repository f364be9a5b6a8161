"""The training step: the loss by hand, what it may depend on, and what it leaves alone."""

import dataclasses
import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm2_jax import compiler_options, init_lora
from glm2_jax.model import unstack_layers
from glm2_jax.schemes import SCHEMES
from tests.support import hurry
from tests.support.toy import (
    TOY,
    abstract_params,
    jit_forward,
    quantized,
    random_tokens,
    toy_params,
)
from train import step as step_module
from train.data.batch import Batch
from train.step import LossScale, init_state, make_eval, make_step, train_step

SMALL = dataclasses.replace(TOY, num_layers=2)
KEY = jax.random.key(5)
SGD, ADAM = optax.sgd(1.0), optax.adam(1e-2)


def batch_of(tokens, segment_ids=None, learned=None) -> Batch:
    tokens = np.asarray(tokens, np.int32)
    segment_ids = np.ones(tokens.shape) if segment_ids is None else np.asarray(segment_ids)
    positions = np.zeros(tokens.shape, np.int32)
    for row, segments in enumerate(segment_ids):
        for segment in np.unique(segments):
            places = segments == segment
            positions[row, places] = np.arange(places.sum())
    if learned is None:
        learned = (positions > 0) & (segment_ids > 0)
    return Batch(tokens, segment_ids.astype(np.int32), positions, np.asarray(learned, bool))


def stacked(*batches: Batch) -> Batch:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


@functools.cache
def adapter(dropout=0.0):
    """One that changes something: B is not zero."""
    lora = init_lora(SMALL, KEY, rank=3, alpha=6, targets="attn", dropout=dropout)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(x + random.normal(0, 0.1, x.shape)), lora)


def small_params():
    return toy_params(SMALL)


def in_type(dtype):
    return jax.tree.map(lambda x: np.asarray(x, dtype), small_params())


def copied(tree):
    return jax.tree.map(jnp.array, tree)


@functools.cache
def compiled(logits_at_once, **options):
    """A step of SGD."""
    step = partial(train_step, SMALL, SGD, **options)
    return jax.jit(step, compiler_options=compiler_options("cpu") | hurry.OPTIONS)


@functools.cache
def step_of(optimizer):
    """As runs take it, which uses up what it is given."""
    return make_step(SMALL, optimizer)


def gradient(base, trained, batch, number=0, **options):
    """The gradient of a step (SGD of rate 1 subtracts it) and its metrics."""
    step = compiled(step_module.LOGITS, **options)
    state = init_state(SGD, trained)
    after, _, metrics = step(base, trained, state, batch, KEY, np.int32(number))
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), trained, after), metrics


def assert_near(found, wanted, rtol=1e-5):
    """Every array to `rtol` of its own size."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=rtol * float(np.abs(y).max()), rtol=0)


jit_eval = make_eval(SMALL)


def evaluate(batch):
    total, count = jit_eval(small_params(), None, batch)
    return float(total), int(count)


def test_the_loss_is_that_of_the_learned_tokens():
    tokens = np.asarray(random_tokens(2, 8))
    learned = np.array([[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]], bool)
    log_probs = np.asarray(jax.nn.log_softmax(jit_forward(SMALL, small_params(), tokens)[0]))
    by_hand = [log_probs[r, t - 1, tokens[r, t]] for r, t in zip(*np.nonzero(learned), strict=True)]
    total, count = evaluate(batch_of(tokens, learned=learned))
    assert (total, count) == (pytest.approx(-np.sum(by_hand), rel=1e-5), 3)


def test_a_packed_row_has_the_loss_of_its_sequences():
    first, second = np.asarray(random_tokens(1, 5)), np.asarray(random_tokens(1, 5, seed=3))
    packed = np.concatenate([first, second, np.zeros((1, 3), np.int32)], axis=1)
    segments = np.array([[1] * 5 + [2] * 5 + [0] * 3])
    learned = np.array([[0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0]], bool)
    together = evaluate(batch_of(packed, segments, learned))
    alone = [
        evaluate(batch_of(ids, learned=mask))
        for ids, mask in ((first, learned[:, :5]), (second, learned[:, 5:10]))
    ]
    assert together[0] == pytest.approx(alone[0][0] + alone[1][0], rel=1e-5)
    assert together[1] == alone[0][1] + alone[1][1] == 5


def test_the_logits_come_in_chunks_that_change_nothing(monkeypatch):
    batch = stacked(batch_of(random_tokens(2, 8)))
    whole, metrics = gradient(None, small_params(), batch)
    monkeypatch.setattr(step_module, "LOGITS", 2 * 3 * SMALL.vocab_size)
    chunks, again = gradient(None, small_params(), batch)
    assert float(again.loss) == pytest.approx(float(metrics.loss), rel=1e-6)
    assert_near(chunks, whole)


def test_packed_rows_have_the_gradient_of_single_ones():
    """Four sequences in two rows, or in a row each, with padding."""
    packed = np.array([[1] * 3 + [2] * 5, [3] * 2 + [4] * 4 + [0] * 2])
    tokens, single, segments = np.asarray(random_tokens(2, 8)), *np.zeros((2, 4, 8), np.int32)
    for row in range(4):
        ids = tokens[packed == row + 1]
        single[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    packed = batch_of(tokens, packed)
    found, metrics = gradient(small_params(), adapter(), stacked(packed))
    wanted, of_single = gradient(small_params(), adapter(), stacked(batch_of(single, segments)))
    assert int(metrics.learned_tokens) == int(of_single.learned_tokens) == 10
    assert float(metrics.loss) == pytest.approx(float(of_single.loss), rel=1e-5)
    assert_near(found, wanted)


def test_the_logits_of_all_positions_never_exist(monkeypatch):
    """Neither forward nor backward: no array of the program is as large."""
    wide = dataclasses.replace(SMALL, vocab_size=4099)

    def largest(limit):
        monkeypatch.setattr(step_module, "LOGITS", limit)
        lora = jax.eval_shape(lambda: init_lora(wide, KEY, rank=2))
        batch = stacked(batch_of(random_tokens(2, 32)))
        args = abstract_params(wide), lora, init_state(SGD, lora), batch, KEY, 0
        text = make_step(wide, SGD).lower(*args).compile().as_text()
        return {size for size in (32, 8, 4) if f"f32[2,{size},4099]" in text}

    assert largest(2 * 8 * 4099) == {8}
    assert largest(2**25) == {32}  # the check sees what it should


def test_nothing_to_learn_is_zero_not_nan():
    batch = stacked(batch_of(random_tokens(2, 8), learned=np.zeros((2, 8))))
    found, metrics = gradient(small_params(), adapter(), batch)
    assert float(metrics.loss) == 0.0 and bool(metrics.finite) and int(metrics.learned_tokens) == 0
    assert all((x == 0).all() for x in jax.tree.leaves(found))


def test_accumulated_batches_are_one_large_batch():
    """Though they have different numbers of learned tokens: not a mean of means."""
    learned = np.zeros((2, 8), bool)
    learned[0, 1:] = True
    learned[1, 6] = True
    large = batch_of(random_tokens(2, 8), learned=learned)
    parts = jax.tree.map(lambda x: x[:, None], large)
    together, metrics = gradient(small_params(), adapter(), stacked(large))
    added, of_parts = gradient(small_params(), adapter(), parts)
    assert float(of_parts.loss) == pytest.approx(float(metrics.loss), rel=1e-6)
    assert int(of_parts.learned_tokens) == int(metrics.learned_tokens) == 8
    assert_near(added, together)


def test_computing_blocks_again_changes_nothing():
    params = unstack_layers(small_params())
    batch = stacked(batch_of(random_tokens(2, 8)))
    kept, _ = gradient(params, adapter(dropout=0.4), batch, noise=5.0, remat=False)
    again, _ = gradient(params, adapter(dropout=0.4), batch, noise=5.0)
    assert_near(again, kept)


@pytest.mark.parametrize("scheme", ["int8", "int4-row"])
def test_a_quantized_base_has_the_gradient_of_the_dequantized_one(scheme):
    small, large = quantized(small_params(), SCHEMES[scheme])
    batch = stacked(batch_of(random_tokens(2, 8)))
    found, metrics = gradient(small, adapter(), batch)
    wanted, of_large = gradient(large, adapter(), batch)
    assert float(metrics.loss) == pytest.approx(float(of_large.loss), rel=1e-5)
    assert_near(found, wanted, rtol=1e-4)


def test_all_parameters_have_the_gradient_of_the_plain_loss():
    batch = batch_of(random_tokens(2, 8))

    def plain(params):
        log_probs = jax.nn.log_softmax(jit_forward(SMALL, params, batch.tokens)[0][:, :-1])
        return -jnp.take_along_axis(log_probs, batch.tokens[:, 1:, None], -1).mean()

    found, _ = gradient(None, small_params(), stacked(batch))
    for direction in range(2):  # against differences, which share no code with the gradient
        random = np.random.default_rng(direction)
        towards = jax.tree.map(lambda x, r=random: np.float32(r.normal(size=x.shape)), found)
        ends = [
            plain(jax.tree.map(lambda x, d, h=h: np.asarray(x) + h * d, small_params(), towards))
            for h in (1e-3, -1e-3)
        ]
        slopes = jax.tree.map(lambda g, d: float((g * d).sum()), found, towards)
        slope = sum(jax.tree.leaves(slopes))
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=0.02, abs=0.02)


def test_randomness_depends_on_the_key_and_the_step_alone():
    batch = stacked(*[batch_of(random_tokens(2, 8))] * 2)
    first, metrics = gradient(small_params(), adapter(dropout=0.4), batch, number=3, noise=5.0)
    again, _ = gradient(small_params(), adapter(dropout=0.4), batch, number=3, noise=5.0)
    other, _ = gradient(small_params(), adapter(dropout=0.4), batch, number=4, noise=5.0)
    for x, y, z in zip(*map(jax.tree.leaves, (first, again, other)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x != z).any()
    one, of_one = gradient(
        small_params(), adapter(dropout=0.4), jax.tree.map(lambda x: x[:1], batch), number=3,
        noise=5.0,
    )  # fmt: skip
    assert float(of_one.loss) != float(metrics.loss)  # the second of two equal batches drops others


def test_noise_is_as_large_as_it_should_be_and_spares_padding():
    segments = np.array([[1] * 4 + [2] * 9 + [0] * 3])
    batch = batch_of(random_tokens(1, 16), segments)
    noise = np.asarray(step_module._noise(SMALL, batch, 5.0, KEY))[0]
    for places, length in ((slice(0, 4), 4), (slice(4, 13), 9)):
        bound = 5.0 / math.sqrt(length * SMALL.hidden_size)
        assert 0.9 * bound < np.abs(noise[places]).max() <= bound
        assert abs(noise[places].mean()) < 0.1 * bound
    assert (noise[13:] == 0).all() and noise.shape == (16, SMALL.hidden_size)


def test_a_step_that_is_not_finite_changes_nothing():
    params = small_params()
    params = {**params, "final_norm": params["final_norm"].at[3].set(np.nan)}
    lora, step = adapter(), step_of(ADAM)
    state = init_state(ADAM, lora)
    batch = stacked(batch_of(random_tokens(2, 8)))
    after, new, metrics = step(params, copied(lora), copied(state), batch, KEY, 0)
    assert not metrics.finite and metrics.skipped and int(new.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, (after, new.optimizer), (lora, state.optimizer))
    after, new, metrics = step(small_params(), after, new, batch, KEY, 1)
    assert metrics.finite and not metrics.skipped and int(new.skipped) == 1
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (after, lora)), strict=True))


def test_overflows_halve_the_loss_scale_until_steps_are_taken():
    batch = stacked(batch_of(random_tokens(2, 8)))
    half, step, lora = in_type(np.float16), step_of(SGD), copied(adapter())
    state = init_state(SGD, lora, loss_scaling=True)
    state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2**24)))
    scales, before = [], adapter()
    for number in range(24):
        scales.append(float(state.loss_scale.scale))
        lora, state, metrics = step(half, lora, state, batch, KEY, number)
        assert metrics.finite
        if not metrics.skipped:
            break
        jax.tree.map(np.testing.assert_array_equal, lora, before)
    assert len(scales) > 1 and scales == [2.0 ** (24 - n) for n in range(len(scales))]
    assert int(state.skipped) == len(scales) - 1 and int(state.loss_scale.good_steps) == 1
    found = jax.tree.map(lambda x, y: x - np.asarray(y), before, lora)
    wanted, of_float32 = gradient(small_params(), adapter(), batch)
    assert float(metrics.loss) == pytest.approx(float(of_float32.loss), rel=1e-2)
    assert_near(found, wanted, rtol=0.1)


def test_the_loss_scale_doubles_after_enough_good_steps_and_never_falls_below_one():
    for before, good, after in (
        ((2**15, 1998), True, (2**15, 1999)),
        ((2**15, 1999), True, (2**16, 0)),
        ((2**24, 1999), True, (2**24, 0)),
        ((2**16, 7), False, (2**15, 0)),
        ((1, 0), False, (1, 0)),
    ):
        scale = LossScale(jnp.float32(before[0]), jnp.int32(before[1])).after(jnp.bool_(good))
        assert (float(scale.scale), int(scale.good_steps)) == after


def test_a_model_that_is_not_finite_is_not_an_overflow():
    half = in_type(np.float16)
    half["final_norm"][0] = np.inf
    lora = copied(adapter())
    state = init_state(SGD, lora, loss_scaling=True)
    batch = stacked(batch_of(random_tokens(2, 8)))
    _, state, metrics = step_of(SGD)(half, lora, state, batch, KEY, 0)
    assert not metrics.finite and metrics.skipped and int(state.skipped) == 1


@pytest.mark.parametrize("what", ["adapter", "all"])
def test_bfloat16_computes_with_float32_parameters(what):
    batch = stacked(batch_of(random_tokens(2, 8)))
    if what == "adapter":
        found, metrics = gradient(in_type(jnp.bfloat16), adapter(), batch)
        wanted, of_float32 = gradient(small_params(), adapter(), batch)
    else:
        found, metrics = gradient(None, small_params(), batch, dtype=jnp.bfloat16)
        wanted, of_float32 = gradient(None, small_params(), batch)
    assert float(metrics.loss) == pytest.approx(float(of_float32.loss), rel=2e-2)
    found, wanted = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (found, wanted)
    )
    norm = np.linalg.norm(wanted)
    assert 0 < np.linalg.norm(found - wanted) < 0.1 * norm
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=0.05)


def test_steps_lower_the_loss_and_repeat_exactly():
    batch = stacked(batch_of(random_tokens(2, 8)))
    step = make_step(SMALL, ADAM)

    def run():
        params = copied(small_params())
        state, losses = init_state(ADAM, params), []
        for number in range(12):
            params, state, metrics = step(None, params, state, batch, KEY, number)
            losses.append(float(metrics.loss))
        return losses

    losses = run()
    assert losses[-1] < 0.5 * losses[0]
    assert run() == losses
    assert step._cache_size() == 1


def test_trained_arrays_and_state_are_donated():
    lora, batch = adapter(), stacked(batch_of(random_tokens(2, 8)))
    state = init_state(ADAM, lora, loss_scaling=True)
    memory = (
        step_of(ADAM).lower(small_params(), lora, state, batch, KEY, 0).compile().memory_analysis()
    )
    given = sum(x.nbytes for x in jax.tree.leaves((lora, state)))
    assert memory.alias_size_in_bytes == given


def test_a_loss_of_the_adapter_only_needs_no_gradient_of_the_base():
    """Products of the backward pass: with the base's gradients there are half as many again."""
    batch = stacked(batch_of(random_tokens(2, 32)))
    params, lora = small_params(), init_lora(SMALL, KEY, rank=1)

    def flops(base, trained):
        step = jax.jit(lambda *args: train_step(SMALL, SGD, *args, remat=False))
        args = base, trained, init_state(SGD, trained), batch, KEY, 0
        return step.lower(*args).cost_analysis()["flops"]

    assert flops(params, lora) < 0.75 * flops(None, params)
