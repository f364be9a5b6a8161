"""Schedules as transformers defines them, and AdamW as torch computes it."""

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
        ours = make_schedule(name, lr=LR, steps=20, warmup=warmup)
        for step in range(20):
            assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6 * LR)
            optimizer.step()
            theirs.step()


def test_a_schedule_by_hand():
    for name, factors in (
        ("constant", (0, 0.5, 1, 1, 1)),
        ("linear", (0, 0.5, 1, 0.5, 0)),
        ("cosine", (0, 0.5, 1, 0.5, 0)),
    ):
        schedule = make_schedule(name, lr=LR, steps=6, warmup=2)
        found = [float(schedule(step)) for step in (0, 1, 2, 4, 6)]
        np.testing.assert_allclose(found, LR * np.array(factors), atol=1e-6 * LR)


@pytest.mark.parametrize(
    ("warmup", "steps", "found"),
    [(0, 100, 0), (0.03, 100, 3), (0.03, 110, 4), (1, 9, 1), (20, 9, 20), (0.03, 1, 0)],
)
def test_a_warmup_below_one_is_a_part_of_the_steps(warmup, steps, found):
    assert warmup_steps(warmup, steps) == found


def updates(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        change, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, change)
    return params


def test_adamw_is_that_of_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 4)).astype(np.float32)
    gradients = [rng.normal(size=(3, 4)).astype(np.float32) for _ in range(5)]
    ours = updates(
        make_optimizer(1e-2, clip=0, weight_decay=0.1),
        {"a": jnp.asarray(start)},
        [{"a": gradient} for gradient in gradients],
    )
    theirs = torch.tensor(start, requires_grad=True)
    adamw = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient)
        adamw.step()
    np.testing.assert_allclose(ours["a"], theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_norms_and_biases_do_not_decay():
    names = ("q", "q_bias", "attn_norm", "b")
    params = {"final_norm": jnp.ones(2), "layers": {name: jnp.ones(2) for name in names}}
    none = jax.tree.map(jnp.zeros_like, params)
    found = updates(make_optimizer(0.1, weight_decay=0.5), params, [none])
    changed = {name: bool((x != 1).any()) for name, x in found["layers"].items()}
    assert changed == {"q": True, "b": True, "q_bias": False, "attn_norm": False}
    assert (found["final_norm"] == 1).all()


def test_clipping_is_by_the_global_norm_and_can_be_left_out():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([6.0, 0.0]), "b": jnp.array([8.0])}  # norm 10

    def moment(clip):
        optimizer = make_optimizer(0.1, clip=clip)
        state = optimizer.update(gradient, optimizer.init(params), params)[1]
        return optax.tree.get(state, "mu")

    for clip, factor in ((0.0, 1), (2.0, 0.2), (20.0, 1)):
        jax.tree.map(
            lambda x, y, factor=factor: np.testing.assert_allclose(x, 0.1 * factor * y, rtol=1e-6),
            moment(clip),
            gradient,
        )
