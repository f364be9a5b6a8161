"""The numbers of a run are arguments of its step: other numbers compile nothing."""

import json

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from glm2_jax.lora import init_lora
from tests.train.test_train_step import (
    KEY,
    SMALL,
    batch_of,
    copied,
    random_tokens,
    small_params,
    stacked,
)
from train import full, lora
from train.optim import Numbers, make_optimizer, make_schedule
from train.step import init_state, make_step

BATCH = stacked(batch_of(random_tokens(2, 8)))


def adapter(alpha=32.0, dropout=0.1):
    start = init_lora(SMALL, jax.random.key(0), rank=2, alpha=alpha, dropout=dropout)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), start)


def numbers(trained, *, name="cosine", lr=5e-5, steps=100, warmup=0.03, **more):
    schedule = make_schedule(name, lr=lr, steps=steps, warmup=warmup)
    others = {"weight_decay": 0.0, "clip": 1.0, "noise": 5.0} | more
    return Numbers.of(schedule, trained, **others)


def program(trained, found, base, number=0):
    state = init_state(found.optimizer(), trained)
    return make_step(SMALL).lower(base, trained, state, BATCH, KEY, number, found)


OTHER = {
    "name": "linear", "lr": 1e-3, "steps": 7, "warmup": 3, "weight_decay": 0.1, "clip": 0.5,
    "noise": 7.0,
}  # fmt: skip


def test_other_numbers_are_the_same_program():
    first, other = adapter(), adapter(alpha=3.0, dropout=0.3)
    one = program(first, numbers(first), small_params()).as_text()
    assert one == program(other, numbers(other, **OTHER), small_params(), number=7).as_text()
    params = small_params()
    one = program(params, numbers(None), None).as_text()
    assert one == program(params, numbers(None, **OTHER), None, number=7).as_text()


@pytest.mark.parametrize(("full_method", "clip"), [(False, 0.01), (True, 0.0)])
def test_arguments_train_as_constants_do(full_method, clip):
    """Also the structure of the state is that of an optimizer with constants, so that checkpoints
    of both are alike."""
    trained = small_params() if full_method else adapter(alpha=6.0, dropout=0.3)
    base = None if full_method else small_params()
    schedule = make_schedule("linear", lr=0.05, steps=9, warmup=2)
    found = Numbers.of(
        schedule, None if full_method else trained, weight_decay=0.1, clip=clip, noise=5.0
    )
    optimizer = make_optimizer(schedule, clip=clip, weight_decay=0.1)
    outcomes = []
    for step, more in ((make_step(SMALL), (found,)), (make_step(SMALL, optimizer, noise=5.0), ())):
        state = copied((trained, init_state(optimizer, trained)))
        losses = []
        for number in range(4):
            *state, metrics = step(base, *state, BATCH, KEY, number, *more)
            losses.append(float(metrics.loss))
        outcomes.append((losses, state))
    (losses, state), (wanted, like) = outcomes
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert losses[-1] != losses[0]
    assert jax.tree.structure(state) == jax.tree.structure(like)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder of compiled programs, in use."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    for on in (True, False):
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()
        if on:
            yield tmp_path / "compiled"


@pytest.mark.parametrize("method", [lora, full])
def test_a_run_with_other_numbers_finds_its_step_in_the_cache(method, cache, tmp_path):
    rows = [json.dumps({"instruction": f"{i}", "output": "好"}) + "\n" for i in range(6)]
    compiled = []
    for number, flags in enumerate(
        (
            ["--lr", "7e-5", "--steps", "2"],
            "--schedule linear --lr 8e-5 --epochs 1 --warmup 0 --weight-decay 0.1 --clip 2".split(),
        )
    ):
        data = tmp_path / f"{number}.jsonl"
        data.write_text("".join(rows[: 4 + number]), encoding="utf-8")
        common = ["--batch-size", "2", "--grad-accum", "1", "--compile-cache", str(cache)]
        output = str(tmp_path / f"out-{number}")
        assert method.main(["--data", str(data), "--output", output, *common, *flags]) == 0
        compiled.append(sorted(x.name for x in cache.iterdir() if "train_step" in x.name))
    assert compiled[0] == compiled[1] != []
