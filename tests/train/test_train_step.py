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
from train.optim import Numbers, make_optimizer, make_schedule
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


ROWS = batch_of(random_tokens(2, 8))
BATCH = stacked(ROWS)


@functools.cache
def adapter(dropout=0.0, alpha=6.0):
    """One that changes something: B is not zero."""
    lora = init_lora(SMALL, KEY, rank=3, alpha=alpha, targets="attn", dropout=dropout)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(x + random.normal(0, 0.1, x.shape)), lora)


def small_params(dtype=np.float32):
    return jax.tree.map(lambda x: np.asarray(x, dtype), toy_params(SMALL))


def copied(tree):
    return jax.tree.map(jnp.array, tree)


@functools.cache
def compiled(logits_at_once, optimizer=SGD, **options):
    """A step that compiles fast, and leaves its arguments alone."""
    step = partial(train_step, SMALL, optimizer, **options)
    return jax.jit(step, compiler_options=compiler_options("cpu"))


@functools.cache
def step_of(optimizer):
    """As runs take it, which uses up what it is given."""
    return make_step(SMALL, optimizer)


def gradient(base, trained, batch=BATCH, number=0, **options):
    """The gradient of a step (SGD of rate 1 subtracts it) and its metrics."""
    step = compiled(step_module.LOGITS, **options)
    state = init_state(SGD, trained)
    after, _, metrics = step(base, trained, state, batch, KEY, np.int32(number))
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), trained, after), metrics


def assert_same(one, other, rtol=1e-5):
    """Of two results of `gradient`: the loss, and every array to `rtol` of its own size."""
    assert float(one[1].loss) == pytest.approx(float(other[1].loss), rel=max(rtol / 10, 1e-5))
    assert int(one[1].learned_tokens) == int(other[1].learned_tokens)
    for x, y in zip(*map(jax.tree.leaves, (one[0], other[0])), strict=True):
        np.testing.assert_allclose(x, y, atol=rtol * float(np.abs(y).max()), rtol=0)


def test_the_loss_is_that_of_the_learned_tokens():
    learned = np.array([[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]], bool)
    log_probs = jax.nn.log_softmax(jit_forward(SMALL, small_params(), ROWS.tokens)[0])
    by_hand = [
        log_probs[row, at - 1, ROWS.tokens[row, at]]
        for row, at in zip(*np.nonzero(learned), strict=True)
    ]
    total, count = make_eval(SMALL)(small_params(), None, batch_of(ROWS.tokens, learned=learned))
    assert (float(total), int(count)) == (pytest.approx(-float(sum(by_hand)), rel=1e-5), 3)


def test_the_logits_come_in_chunks_that_change_nothing(monkeypatch):
    whole = gradient(None, small_params())
    monkeypatch.setattr(step_module, "LOGITS", 2 * 3 * SMALL.vocab_size)
    assert_same(gradient(None, small_params()), whole)


def test_the_logits_of_all_positions_never_exist(monkeypatch):
    """Neither forward nor backward: no array of the program is as large."""
    wide = dataclasses.replace(SMALL, vocab_size=4099, num_layers=1)

    def largest(limit):
        monkeypatch.setattr(step_module, "LOGITS", limit)
        lora = jax.eval_shape(lambda: init_lora(wide, KEY, rank=2))
        batch = stacked(batch_of(random_tokens(2, 32)))
        args = abstract_params(wide), lora, init_state(SGD, lora), batch, KEY, 0
        text = make_step(wide, SGD).lower(*args).compile().as_text()
        return {size for size in (32, 8, 4) if f"f32[2,{size},4099]" in text}

    assert largest(2 * 8 * 4099) == {8}
    assert largest(2**25) == {32}  # the check sees what it should


def test_packed_rows_have_the_gradient_of_single_ones():
    """Four sequences in two rows, or in a row each, with padding."""
    packed = np.array([[1] * 3 + [2] * 5, [3] * 2 + [4] * 4 + [0] * 2])
    single, segments = np.zeros((2, 4, 8), np.int32)
    for row in range(4):
        ids = ROWS.tokens[packed == row + 1]
        single[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    found = gradient(small_params(), adapter(), stacked(batch_of(ROWS.tokens, packed)))
    wanted = gradient(small_params(), adapter(), stacked(batch_of(single, segments)))
    assert int(found[1].learned_tokens) == 10
    assert_same(found, wanted)


def test_nothing_to_learn_is_zero_not_nan():
    batch = stacked(batch_of(ROWS.tokens, learned=np.zeros((2, 8))))
    found, metrics = gradient(small_params(), adapter(), batch)
    assert float(metrics.loss) == 0.0 and bool(metrics.finite) and int(metrics.learned_tokens) == 0
    assert all((x == 0).all() for x in jax.tree.leaves(found))


def test_accumulated_batches_are_one_large_batch():
    """Though they have different numbers of learned tokens: not a mean of means."""
    learned = np.zeros((2, 8), bool)
    learned[0, 1:] = True
    learned[1, 6] = True
    large = batch_of(ROWS.tokens, learned=learned)
    parts = jax.tree.map(lambda x: x[:, None], large)
    together = gradient(small_params(), adapter(), stacked(large))
    assert_same(gradient(small_params(), adapter(), parts), together)


def test_randomness_depends_on_the_key_and_the_step_alone():
    """Not on whether blocks are computed again in the backward pass."""
    args = unstack_layers(small_params()), adapter(dropout=0.4)
    first, metrics = gradient(*args, number=3)
    again, _ = gradient(*args, number=3)
    other, _ = gradient(*args, number=4)
    for x, y, z in zip(*map(jax.tree.leaves, (first, again, other)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x != z).any()
    assert_same(gradient(*args, number=3, remat="none"), (first, metrics))
    _, of_two = gradient(*args, stacked(ROWS, ROWS), number=3)
    assert float(of_two.loss) != float(metrics.loss)  # the second of two equal ones drops others


def test_a_quantized_base_has_the_gradient_of_the_dequantized_one():
    small, large = quantized(small_params(), SCHEMES["int4-row"])
    assert_same(gradient(small, adapter()), gradient(large, adapter()), rtol=1e-4)


def test_all_parameters_have_the_gradient_of_the_plain_loss():
    def plain(params):
        log_probs = jax.nn.log_softmax(jit_forward(SMALL, params, ROWS.tokens)[0][:, :-1])
        return -jnp.take_along_axis(log_probs, ROWS.tokens[:, 1:, None], -1).mean()

    found, _ = gradient(None, small_params())
    for direction in range(2):  # against differences, which share no code with the gradient
        random = np.random.default_rng(direction)
        towards = jax.tree.map(lambda x, r=random: np.float32(r.normal(size=x.shape)), found)
        ends = [
            plain(jax.tree.map(lambda x, d, h=h: x + h * d, small_params(), towards))
            for h in (1e-3, -1e-3)
        ]
        slopes = jax.tree.map(lambda g, d: float((g * d).sum()), found, towards)
        slope = sum(jax.tree.leaves(slopes))
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=0.02, abs=0.02)


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
    params, lora, step = small_params(), adapter(), step_of(ADAM)
    params["final_norm"] = np.where(np.arange(len(params["final_norm"])) == 3, np.nan, 1.0)
    given = copied((lora, init_state(ADAM, lora)))
    after, new, metrics = step(params, *given, BATCH, KEY, 0)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))  # they are donated
    assert not metrics.finite and metrics.skipped and int(new.skipped) == 1
    wanted = lora, init_state(ADAM, lora).optimizer
    jax.tree.map(np.testing.assert_array_equal, (after, new.optimizer), wanted)
    after, new, metrics = step(small_params(), after, new, BATCH, KEY, 1)
    assert metrics.finite and not metrics.skipped and int(new.skipped) == 1
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (after, lora)), strict=True))


def test_overflows_halve_the_loss_scale_until_steps_are_taken():
    half, step, lora = small_params(np.float16), step_of(SGD), copied(adapter())
    state = init_state(SGD, lora, loss_scaling=True)
    state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2**24)))
    scales, before = [], adapter()
    for number in range(24):
        scales.append(float(state.loss_scale.scale))
        lora, state, metrics = step(half, lora, state, BATCH, KEY, number)
        assert metrics.finite
        if not metrics.skipped:
            break
        jax.tree.map(np.testing.assert_array_equal, lora, before)
    assert len(scales) > 1 and scales == [2.0 ** (24 - n) for n in range(len(scales))]
    assert int(state.skipped) == len(scales) - 1 and int(state.loss_scale.good_steps) == 1
    found = jax.tree.map(lambda x, y: x - np.asarray(y), before, lora)
    assert_same((found, metrics), gradient(small_params(), adapter()), rtol=0.1)

    half["final_norm"][0] = np.inf  # the model's fault is not an overflow
    _, state, metrics = step(half, lora, state, BATCH, KEY, 0)
    assert not metrics.finite and metrics.skipped and int(state.skipped) == len(scales)


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


@pytest.mark.parametrize("what", ["adapter", "all"])
def test_bfloat16_computes_with_float32_parameters(what):
    if what == "adapter":
        found, metrics = gradient(small_params(jnp.bfloat16), adapter())
        wanted, of_float32 = gradient(small_params(), adapter())
    else:
        found, metrics = gradient(None, small_params(), dtype=jnp.bfloat16)
        wanted, of_float32 = gradient(None, small_params())
    assert float(metrics.loss) == pytest.approx(float(of_float32.loss), rel=2e-2)
    found, wanted = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (found, wanted)
    )
    norm = np.linalg.norm(wanted)
    assert 0 < np.linalg.norm(found - wanted) < 0.1 * norm
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=0.05)


def numbers(trained, *, name="cosine", lr=5e-5, steps=100, warmup=0.03, **more) -> Numbers:
    schedule = make_schedule(name, lr=lr, steps=steps, warmup=warmup)
    return Numbers.of(schedule, trained, **{"weight_decay": 0.0, "clip": 1.0, "noise": 5.0} | more)


def test_other_numbers_are_the_same_program():
    other = {"name": "linear", "lr": 1e-3, "steps": 7, "warmup": 3, "weight_decay": 0.1,
             "clip": 0.5, "noise": 7.0}  # fmt: skip

    def program(base, trained, lora, number=0, **more) -> str:
        found = numbers(lora, **more)
        state = init_state(found.optimizer(), trained)
        lowered = make_step(SMALL).lower(base, trained, state, BATCH, KEY, number, found)
        return lowered.as_text()

    params, one, two = small_params(), adapter(dropout=0.1), adapter(dropout=0.3, alpha=3.0)
    assert program(params, one, one) == program(params, two, two, number=7, **other)
    assert program(None, params, None) == program(None, params, None, number=7, **other)


def test_arguments_train_as_constants_do():
    """Also the structure of the state is that of an optimizer with constants, so that checkpoints
    of both are alike."""
    trained, base = adapter(dropout=0.3), small_params()
    some = {"name": "linear", "lr": 0.05, "steps": 9, "warmup": 2, "weight_decay": 0.1}
    found = numbers(trained, **some, clip=0.01, noise=0)
    optimizer = make_optimizer(found.schedule, clip=0.01, weight_decay=0.1)
    outcomes = []
    for step, more in (
        (compiled(step_module.LOGITS, None), (found,)),
        (compiled(step_module.LOGITS, optimizer), ()),
    ):
        state, losses = (trained, init_state(optimizer, trained)), []
        for number in range(4):
            *state, metrics = step(base, *state, BATCH, KEY, number, *more)
            losses.append(float(metrics.loss))
        outcomes.append((losses, state))
    (losses, state), (wanted, like) = outcomes
    noisy = numbers(trained, **some)
    step, start = compiled(step_module.LOGITS, None), init_state(noisy.optimizer(), trained)
    rows = [step(base, trained, start, BATCH, KEY, number, noisy)[2].loss for number in (0, 0, 1)]
    assert rows[0] == rows[1] and len({*map(float, rows), losses[0]}) == 3
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert losses[-1] != losses[0]
    assert jax.tree.structure(state) == jax.tree.structure(like)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
