"""The training loop by itself: when it logs, evaluates, saves and ends. Nothing is computed."""

import contextlib
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm2_jax.errors import CheckpointError, InputError
from train import loop as loop_module
from train import lora
from train.data.batches import Step
from train.loop import Loop, Position
from train.run import report
from train.step import Metrics

NAN, INF = math.nan, math.inf


class Log:
    def __init__(self):
        self.steps, self.evaluations, self.finished = [], [], 0

    def step(self, step, tokens, memory, **figures):
        self.steps.append((step, tokens, figures))

    def evaluation(self, step, split, **figures):
        self.evaluations.append((step, split, figures["loss"]))

    def finish(self):
        self.finished += 1

    def apart(self):
        return contextlib.nullcontext()


class Saved(dict):
    """Checkpoints by step."""

    newest = property(lambda self: max(self, default=None))

    def save(self, step, state, position):
        self[step] = state, json.loads(json.dumps(position, allow_nan=False))

    def finish(self):
        pass


class Stopping:
    def __init__(self, after: float = INF):
        self.signal, self._left = None, after

    def agree(self) -> bool:
        self._left -= 1
        self.signal = 15 if self._left <= 0 else None
        return self.signal is not None


class Data:
    def places(self, step):
        return ((0, number) for number in range(step, 100))

    def at(self, epoch, step):
        return Step(step, [f"data:{step + 1}"], 5)  # type: ignore[arg-type]


def metrics(loss=1.0, finite=True, skipped=False) -> Metrics:
    return Metrics(*map(np.asarray, (loss, 2.0, 1, finite, skipped)))


def bad(state, batch, number):
    return state, metrics(NAN, finite=False, skipped=True)


@pytest.fixture(autouse=True)
def no_memory(monkeypatch):
    monkeypatch.setattr(loop_module, "peak_bytes", lambda device: None)


def make(*flags: str, total=6, platform="cpu", **more: Any) -> Any:
    """A loop whose state counts the steps."""
    args = lora.parser().parse_args(["--data", "d", "--save-every", "4", *flags])
    found = {
        "step": lambda state, batch, number: (state + 1, metrics(10.0 - number)),
        "evaluate": None, "rate": lambda updates: updates / 10, "batches": Data(),
        "device": SimpleNamespace(platform=platform), "log": Log(), "checkpoints": Saved(),
        "stopping": Stopping(),
    }  # fmt: skip
    return Loop(lora.make_recipe(args), total, **found | more)  # type: ignore[arg-type]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_steps_are_logged_and_saved_where_it_is_due(platform):
    loop, position = make(platform=platform), Position()
    assert loop.run(0, position) == 6
    assert [step for step, *_ in loop.log.steps] == [1, 2, 3, 4, 5, 6] and loop.log.finished == 1
    assert loop.log.steps[2] == (3, 5, {"loss": 8.0, "lr": 0.2, "grad_norm": 2.0})
    assert {step: state for step, (state, _) in loop.checkpoints.items()} == {4: 4, 6: 6}
    assert position.losses == {"training": [[1, 10.0], [6, 5.0]]}

    again = make(platform=platform)
    state, saved = loop.checkpoints[4]
    assert again.run(state, Position.restored(saved, 4)) == 6
    assert again.log.steps == loop.log.steps[4:] and again.checkpoints[6] == loop.checkpoints[6]


def test_a_signal_ends_the_run_after_saving():
    loop, position = make(stopping=Stopping(after=3)), Position()
    assert loop.run(0, position) == 3 and position.step == 3
    assert list(loop.checkpoints) == [3] and loop.log.finished == 0  # resuming logs the step


@pytest.mark.parametrize(
    ("losses", "steps", "best"),
    [
        ((3.0, 2.0, 1.0, 1.5, 1.2), 4, 2),
        ((3.0, INF, NAN), 2, None),
        ((NAN, NAN, 2.0, 1.0, NAN, 1.5), 5, 3),
    ],
)
def test_early_stopping_keeps_the_best_and_never_what_is_not_finite(losses, steps, best, capsys):
    script, best_states, position = iter(losses), Saved(), Position()
    loop = make("--eval-every", "1", "--early-stop", "2", best=best_states)
    loop.evaluate = lambda state: {"validation": {"loss": next(script)}, "guard": {"loss": 9.0}}
    assert loop.run(0, position) == steps
    assert (position.best_step or None, best_states.newest) == (best, best)
    if best is not None:
        assert position.best == losses[best] and best_states[best][0] == best
    evaluations = loop.log.evaluations[::2]
    assert [step for step, _, _ in evaluations] == list(range(len(losses)))
    np.testing.assert_array_equal([loss for *_, loss in evaluations], losses)
    assert capsys.readouterr().err.count("is not finite") == np.sum(~np.isfinite(losses))
    assert position.losses["guard"] == [[0, 9.0], [steps, 9.0]]


def test_a_killed_run_evaluates_again_without_saving_the_best_twice():
    best = Saved({4: "of the killed run"})
    loop = make("--eval-every", "4", best=best, evaluate=lambda state: {"v": {"loss": 1.0}})
    position = Position(step=3)
    loop.run(3, position)
    assert best[4] == "of the killed run" and position.best_step == 4


def test_a_step_that_is_not_finite_ends_the_run_or_is_left_out(capsys):
    loop = make(step=bad)
    with pytest.raises(InputError, match="step 1 is NaN or infinite; its rows: data:1\n") as error:
        loop.run(0, Position())
    assert "--nan-policy skip" in error.value.fix and not loop.checkpoints
    position, skip = Position(), ("--nan-policy", "skip")
    make(*skip, total=4, step=bad).run(0, position)
    assert position.skipped == 4 and capsys.readouterr().err.count("skipped") == 4
    with pytest.raises(InputError, match=", as in the 4 steps before"):
        make(*skip, step=bad).run(0, Position())


def test_an_overflow_of_float16_is_skipped_and_the_rate_counts_updates(capsys):
    loop, position = make(total=3), Position()
    loop.step = lambda state, batch, number: (state, metrics(skipped=number == 0))
    loop.run(0, position)
    assert position.skipped == 1 and "the loss scale is halved" in capsys.readouterr().err
    assert [figures["lr"] for _, _, figures in loop.log.steps] == [0.0, 0.0, 0.1]
    assert [figures.get("skipped") for *_, figures in loop.log.steps] == [1, 1, 1]


def test_a_position_is_restored_as_it_was_saved_or_refused():
    saved = vars(Position(step=3, best=1.5, best_step=2))
    assert Position.restored(saved, 3) == Position(**saved)
    assert Position(step=3, best=NAN, best_step=2).best is None  # as an older version saved it
    for damaged in (saved | {"step": 2}, saved | {"waited": "x"}, saved | {"more": 1}, None):
        with pytest.raises(CheckpointError, match="after step 3 is damaged"):
            Position.restored(damaged, 3)


def test_the_outcome_of_a_run_is_refused_or_reported(capsys):
    with pytest.raises(InputError, match="all 2 steps were skipped"):
        report(Position(step=2, skipped=2), 2, choosing=False)
    with pytest.raises(InputError, match="no validation loss was finite"):
        report(Position(step=2), 2, choosing=True)
    position = Position(step=5, best=1.0, best_step=3, skipped=1)
    for step, loss in ((1, 4.0), (2, NAN), (3, 1.0)):
        position.note_loss("training", step, loss)
    position.losses = {"validation": [[0, None], [3, None]], **position.losses}
    assert json.loads(json.dumps(vars(position), allow_nan=False)) == vars(position)
    report(position, 6, choosing=True)
    assert capsys.readouterr().err.splitlines() == [
        "1 of 5 steps were skipped",
        "ended after step 5 of 6: the validation loss stopped improving",
        "the best evaluation was after step 3, loss 1",
        "training loss 4 -> 1 (step 1 -> 3), 75 % lower",
        "validation loss not finite -> not finite (step 0 -> 3)",
    ]


def diverging(state, batch, number):
    """A loss that falls for 30 steps, and rises far above its lowest."""
    return state + 1, metrics(2.0 - number / 20 if number < 30 else 9.0)


def test_a_run_that_diverges_ends_and_keeps_an_earlier_checkpoint():
    loop, position = make(total=90, step=diverging), Position()
    with pytest.raises(InputError, match=r"has diverged: its loss is 8\.\d+ after step 5\d") as end:
        loop.run(0, position)
    assert end.value.exit_code == 3 and "lower --lr" in end.value.fix
    assert loop.checkpoints.newest in range(28, 36) and 50 <= position.step < 60

    state, saved = loop.checkpoints[28]
    again = make(total=90, step=diverging)
    with pytest.raises(InputError) as other:  # where it was stopped does not matter
        again.run(state, Position.restored(saved, 28))
    assert str(other.value) == str(end.value)
    on = make("--stop-diverged", "off", total=90, step=diverging)
    assert on.run(0, Position()) == 90 and 88 in on.checkpoints


@pytest.mark.parametrize("loss", [lambda n: 0.001 + 0.3 * (n % 7 == 0), lambda n: 8.0 + n % 5])
def test_losses_that_vary_have_not_diverged(loss):
    loop = make(total=90, step=lambda state, batch, number: (state + 1, metrics(loss(number))))
    assert loop.run(0, Position()) == 90
