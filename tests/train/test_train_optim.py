"""Schedules as transformers defines them, and AdamW as torch computes it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.optim import make_optimizer, make_schedule, warmup_steps
from train.options import SCHEDULES

STEPS, LR = 50, 3e-3


def expected(name: str, step: int, warmup: int, steps: int) -> float:
    """The factor of transformers' get_{cosine,linear,constant}_schedule_with_warmup."""
    if step < warmup:
        return step / max(1, warmup)
    if name == "constant":
        return 1.0
    if name == "linear":
        return max(0.0, (steps - step) / max(1, steps - warmup))
    progress = (step - warmup) / max(1, steps - warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


@pytest.mark.parametrize("warmup", [0, 7, 50])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, warmup):
    schedule = make_schedule(name, lr=LR, steps=STEPS, warmup=warmup)
    found = [float(schedule(step)) for step in range(STEPS + 1)]
    wanted = [LR * expected(name, step, warmup, STEPS) for step in range(STEPS + 1)]
    if warmup == STEPS:  # transformers has 0 / 1 = the whole rate, or 0, left for a step too many
        found, wanted = found[:-1], wanted[:-1]
    np.testing.assert_allclose(found, wanted, atol=1e-6 * LR)


def test_schedules_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for name in SCHEDULES:
        kind = {"constant": "constant_with_warmup"}.get(name, name)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
        theirs = transformers.get_scheduler(
            kind, optimizer, num_warmup_steps=6, num_training_steps=20
        )
        ours = make_schedule(name, lr=LR, steps=20, warmup=6)
        for step in range(20):
            assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6 * LR)
            optimizer.step()
            theirs.step()


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
