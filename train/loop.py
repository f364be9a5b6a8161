"""The training loop: steps, and between them the log, evaluations and checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from glm2_jax.cli.messages import note
from glm2_jax.errors import CheckpointError, InputError
from infer.memory.peak import peak_bytes
from train.data.batches import Batches
from train.recipe import Recipe
from train.run_folder.checkpoints import Checkpoints
from train.run_folder.log import Log
from train.step import Metrics
from train.stopping import Stopping

_ROWS_SHOWN = 8
_BAD_IN_A_ROW = 5  # steps after which leaving them out does not help
# A run has diverged where its loss, averaged over about this many steps, has been so many times its
# lowest, and so many nats above it, for that many steps.
_AVERAGED, _TIMES, _NATS, _PATIENCE = 10, 2, 1.0, 20


class NotFinite(InputError):
    """Numbers of a run are NaN or infinite: its data or its settings are at fault."""


@dataclass
class Position:
    """The progress of a run, saved with its arrays."""

    step: int = 0  # steps taken
    best: float | None = None  # lowest finite loss of an evaluation, None before the first
    best_step: int = 0  # steps taken then
    waited: int = 0  # evaluations since
    skipped: int = 0  # steps that were skipped
    average: float | None = None  # of the loss over the last steps
    lowest: float | None = None  # the lowest such average
    above: int = 0  # steps in a row that it is far above
    # name of a set, or "training" -> first and last [step, loss], None for a loss that is not
    # finite
    losses: dict[str, list[list[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.best is not None and not math.isfinite(self.best):  # as an older version saved it
            self.best = None

    @classmethod
    def restored(cls, saved: Any, step: int) -> Position:
        """Return the position saved after `step` steps; CheckpointError if it is damaged."""
        try:
            position = cls(**saved)
            counts = position.best_step, position.waited, position.skipped
            if position.step != step or not all(isinstance(count, int) for count in counts):
                raise TypeError(f"expected step {step}, got {saved}")
        except TypeError as error:
            raise CheckpointError(
                f"the position in the checkpoint after step {step} is damaged",
                str(error)[:300],
                f"Remove that checkpoint, the folder {step}, then --resume auto.",
            ) from error
        return position

    def note_loss(self, name: str, step: int, loss: float) -> None:
        """Keep a loss as the last of its set, and as the first if there is none yet."""
        found = [step, loss if math.isfinite(loss) else None]  # JSON has no NaN
        self.losses[name] = [self.losses.get(name, [found])[0], found]

    def watch(self, loss: float) -> bool:
        """Count the loss of a step; return whether the run has diverged."""
        if not math.isfinite(loss):
            return False
        average = loss if self.average is None else self.average
        self.average = average = average + (loss - average) / _AVERAGED
        self.lowest = average if self.lowest is None else min(self.lowest, average)
        far = average > max(_TIMES * self.lowest, self.lowest + _NATS)
        self.above = self.above + 1 if far else 0
        return self.above >= _PATIENCE


@dataclass
class Loop:
    """Takes the steps of a run."""

    recipe: Recipe
    total: int  # steps to take
    # (state, batch, number of the step from 0) -> (state, metrics); the state is used up
    step: Callable[[Any, Any, int], tuple[Any, Metrics]]
    # state -> name of a set -> its figures, `loss` among them; None = nothing to evaluate. The
    # first set decides which evaluation is the best
    evaluate: Callable[[Any], dict[str, dict[str, float]]] | None
    # number of updates so far -> learning rate of the next, for the log
    rate: Callable[[int], float]
    device: Any  # the device whose memory is logged
    batches: Batches
    log: Log
    stopping: Stopping  # asked after every step, by all processes
    checkpoints: Checkpoints
    best: Checkpoints | None = None  # of the best evaluation; None = do not keep it
    # takes the number of steps and the figures of every evaluation
    watch: Callable[[int, dict[str, dict[str, float]]], object] | None = None

    def __post_init__(self) -> None:
        self._unread: tuple[int, Metrics, list[str], int] | None = None
        # A GPU computes a step while the one before is read; a CPU does not, and is timed better.
        self._ahead = self.device.platform != "cpu"
        self._bad = 0  # steps in a row

    def run(self, state: Any, position: Position) -> Any:
        """Take the steps that are left, or those until a signal; return the state.

        The given state, after `position.step` steps, is used up; the position is moved forward.
        InputError where loss or gradient is not finite, the loss diverges, or the disk is full; the
        last checkpoint stays.
        """
        every, save_every = self.recipe.evaluation.eval_every, self.recipe.output.save_every
        patience = self.recipe.evaluation.early_stop or math.inf
        if position.step == 0 and self.evaluate is not None:
            self._evaluate(state, position)
        places = self.batches.places(position.step)
        while position.step < self.total and position.waited < patience:
            batch, rows, tokens = self.batches.at(*next(places))
            state, metrics = self.step(state, batch, position.step)
            step = position.step = position.step + 1
            self._read(position)
            self._unread = step, metrics, rows, tokens
            if not self._ahead:
                self._read(position)
            asked_to_stop = self.stopping.agree()
            due = step == self.total or (every is not None and step % every == 0)
            # Saved after an evaluation, too, to keep its outcome.
            if asked_to_stop or due or step % save_every == 0:
                self._read(position)
                if due and self.evaluate is not None:
                    self._choose(state, position)
                # One that may be of a diverging run does not push out one from before.
                doubtful = position.above and self.recipe.training.stop_diverged == "on"
                if not doubtful or asked_to_stop or step == self.total:
                    self.checkpoints.save(step, state, dataclasses.asdict(position))
            if asked_to_stop:
                break
        self._read(position)
        if not self.stopping.signal:
            self.log.finish()
        self.checkpoints.finish()
        return state

    def _choose(self, state: Any, position: Position) -> None:
        """Evaluate, and keep the best."""
        losses = self._evaluate(state, position)
        if not losses:
            return
        loss, step = losses[0], position.step
        if not (math.isfinite(loss) and (position.best is None or loss < position.best)):
            position.waited += 1
            return
        position.best, position.best_step, position.waited = loss, step, 0
        if self.best is not None and self.best.newest != step:  # a killed run evaluates again
            self.best.save(step, state, {})

    def _evaluate(self, state: Any, position: Position) -> list[float]:
        """Evaluate, log it, and return the losses of the sets."""
        assert self.evaluate is not None
        with self.log.apart():
            found = self.evaluate(state)
        for split, figures in found.items():
            self.log.evaluation(position.step, split, **figures)
            position.note_loss(split, position.step, figures["loss"])
            if not math.isfinite(figures["loss"]):
                note(f"warning: the {split} loss after step {position.step} is not finite")
        if self.watch is not None:
            self.watch(position.step, found)
        return [figures["loss"] for figures in found.values()]

    def _read(self, position: Position) -> None:
        """Wait for the figures of the step that was dispatched last, and log them."""
        if self._unread is None:
            return
        step, metrics, rows, tokens = self._unread
        self._unread = None
        metrics = jax.device_get(metrics)
        if not metrics.finite:
            self._not_finite(step, rows)
        elif metrics.skipped:
            note(f"step {step}: gradients overflowed float16; the loss scale is halved")
        self._bad = 0 if metrics.finite else self._bad + 1
        rate = self.rate(step - 1 - position.skipped)
        position.skipped += int(metrics.skipped)
        figures = {"loss": metrics.loss, "lr": rate, "grad_norm": metrics.grad_norm}
        figures |= metrics.figures or {}
        if position.skipped:
            figures["skipped"] = position.skipped
        figures = {name: float(value) for name, value in figures.items()}
        position.note_loss("training", step, figures["loss"])
        self.log.step(step, tokens, peak_bytes(self.device), **figures)
        if position.watch(figures["loss"]) and self.recipe.training.stop_diverged == "on":
            self._diverged(step, position)

    def _diverged(self, step: int, position: Position) -> None:
        raise InputError(
            f"the training has diverged: its loss is {position.average:.4g} after step {step}, "
            f"averaged over the last steps; the lowest was {position.lowest:.4g}",
            f"It has been more than {_TIMES} times the lowest for {_PATIENCE} steps. The last "
            "checkpoint is from before them.",
            "Start again with a lower --lr and another --output, or continue: --resume auto "
            "--stop-diverged off.",
        )

    def _not_finite(self, step: int, rows: list[str]) -> None:
        shown = "; ".join(rows[:_ROWS_SHOWN]) + ("; ..." if len(rows) > _ROWS_SHOWN else "")
        what = f"loss or gradient of step {step} is NaN or infinite; its rows: {shown}"
        if self.recipe.training.nan_policy == "abort" or self._bad + 1 == _BAD_IN_A_ROW:
            also = f", as in the {self._bad} steps before" if self._bad else ""
            raise NotFinite(
                what + also,
                "The step was not applied; the last checkpoint is from before it.",
                "Check these rows, lower --lr, or skip such steps: --nan-policy skip.",
            )
        note(f"{what}; skipped")
