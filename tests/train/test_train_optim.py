"""Schedules as transformers defines them, and what clipping and decay apply to; AdamW itself is
compared in test_train_peft."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.optim import make_optimizer, make_schedule, warmup_steps
from train.options import SCHEDULES

LR = 3e-3


def test_schedules_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for name, warmup in itertools.product(SCHEDULES, (0, 6, 20)):
        kind = {"constant": "constant_with_warmup"}.get(name, name)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
        theirs = transformers.get_scheduler(
            kind, optimizer, num_warmup_steps=warmup, num_training_steps=20
        )
        ours = jax.jit(make_schedule(name, lr=LR, steps=20, warmup=warmup))
        for step in range(20):
            assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6 * LR)
            optimizer.step()
            theirs.step()


def test_a_schedule_by_hand():
    for name, last in (("constant", (1, 1)), ("linear", (0.5, 0)), ("cosine", (0.5, 0))):
        schedule = make_schedule(name, lr=LR, steps=6, warmup=2)
        found = [float(schedule(step)) for step in (0, 1, 2, 4, 6)]
        np.testing.assert_allclose(found, LR * np.array((0, 0.5, 1, *last)), atol=1e-6 * LR)
    steps = [warmup_steps(*x) for x in ((0, 9), (0.03, 100), (0.03, 110), (20, 9), (0.03, 1))]
    assert steps == [0, 3, 4, 20, 0]


def test_clipping_is_by_the_global_norm_and_norms_and_biases_do_not_decay():
    params = {name: jnp.ones(2) for name in ("q", "b", "q_bias", "final_norm")}
    gradient = {name: jnp.zeros(2) for name in params}
    gradient |= {"q": jnp.array([6.0, 0.0]), "b": jnp.array([0.0, 8.0])}  # norm 10
    for clip, factor in ((0.0, 1), (2.0, 0.2), (20.0, 1)):
        optimizer = make_optimizer(0.1, clip=clip)
        state = optimizer.update(gradient, optimizer.init(params), params)[1]
        for name, moment in optax.tree.get(state, "mu").items():
            np.testing.assert_allclose(moment, 0.1 * factor * gradient[name], rtol=1e-6)
    optimizer, none = make_optimizer(0.1, weight_decay=0.5), jax.tree.map(jnp.zeros_like, params)
    change, _ = optimizer.update(none, optimizer.init(params), params)
    decayed = {name: bool(x.any()) for name, x in change.items()}
    assert decayed == {"q": True, "b": True, "q_bias": False, "final_norm": False}
