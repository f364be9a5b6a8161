"""The loop: steps, and between them the log, evaluations and checkpoints."""

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
from train.run_folder.checkpoints import Checkpoints
from train.run_folder.log import Log
from train.step import Metrics
from train.stopping import Stopping

_ROWS_SHOWN = 8
_BAD_IN_A_ROW = 5  # steps after which leaving them out does not help


@dataclass
class Position:
    """Where a run is, beside its arrays; saved with them.

    Attributes:
        step: steps taken.
        best: lowest finite loss of an evaluation, None before the first.
        best_step: steps taken then.
        waited: evaluations since.
        skipped: steps that changed nothing.
        losses: name of a set, or "training" -> first and last [step, loss], None for a loss that
            is not finite.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    skipped: int = 0
    losses: dict[str, list[list[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.best is not None and not math.isfinite(self.best):  # as an older version saved it
            self.best = None

    @classmethod
    def restored(cls, saved: Any, step: int) -> Position:
        """Return the position that was saved after `step` steps.

        Raises:
            CheckpointError: it is damaged.
        """
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
        """Keep the loss as the last of its set, and as the first if it is that."""
        found = [step, loss if math.isfinite(loss) else None]  # JSON has no NaN
        self.losses[name] = [self.losses.get(name, [found])[0], found]


@dataclass(frozen=True)
class Run:
    """What is done, and what with.

    Attributes:
        step: (state, batch, number of the step from 0) -> (state, metrics); the state is used up.
        evaluate: state -> name of a set -> its figures, `loss` among them; None = nothing to
            evaluate. The first set decides which evaluation is the best.
        rate: number of updates so far -> learning rate of the next, for the log.
        device: whose memory is told.
        batches: the data by epoch and place.
        total: steps to take.
        eval_every, early_stop, save_every: as the flags; None = only at the end, never.
        skip_bad: leave a step out where its loss or gradient is not finite, instead of ending.
    """

    step: Callable[[Any, Any, int], tuple[Any, Metrics]]
    evaluate: Callable[[Any], dict[str, dict[str, float]]] | None
    rate: Callable[[int], float]
    device: Any
    batches: Batches
    total: int
    eval_every: int | None
    early_stop: int | None
    save_every: int
    skip_bad: bool


class Loop:
    """Takes the steps of a run.

    Args:
        run: what is done.
        log: is told of every step and evaluation.
        checkpoints: where the state goes.
        best: where that of the best evaluation goes; None = nowhere.
        stopping: looked at after every step, by all processes.
    """

    def __init__(
        self,
        run: Run,
        log: Log,
        checkpoints: Checkpoints,
        best: Checkpoints | None,
        stopping: Stopping,
    ):
        self._run, self._log = run, log
        self._checkpoints, self._best, self._stopping = checkpoints, best, stopping
        self._unread: tuple[int, Metrics, list[str], int] | None = None
        # A GPU computes a step while the one before is read; a CPU does not, and is timed better.
        self._ahead = run.device.platform != "cpu"
        self._bad = 0  # steps in a row

    def go(self, state: Any, position: Position) -> Any:
        """Takes the steps that are left, or those until a signal; returns the state.

        Args:
            state: pytree of arrays, after `position.step` steps; is used up.
            position: is moved on.

        Raises:
            InputError: loss or gradient is not finite, with the step and its rows; or the disk is
                full. The last checkpoint stays.
        """
        run = self._run
        if position.step == 0 and run.evaluate is not None:
            self._evaluate(state, position)
        while position.step < run.total and not self._patience_lost(position):
            place = run.batches.place(position.step)
            (batch, rows), tokens = run.batches.at(*place), run.batches.tokens(*place)
            state, metrics = run.step(state, batch, position.step)
            position.step += 1
            self._read(position)
            self._unread = position.step, metrics, rows, tokens
            if not self._ahead:
                self._read(position)
            asked_to_stop = self._stopping.agree()
            if asked_to_stop or self._due(position.step):
                self._read(position)
                self._look(state, position)
                self._checkpoints.save(position.step, state, dataclasses.asdict(position))
            if asked_to_stop:
                break
        self._read(position)
        if not self._stopping.signal:
            self._log.finish()
        self._checkpoints.finish()
        return state

    def _due(self, step: int) -> bool:
        """Whether a checkpoint is, or an evaluation, of which it keeps the outcome."""
        run = self._run
        evaluated = run.eval_every is not None and step % run.eval_every == 0
        saved = step % run.save_every == 0 or step == run.total
        return saved or evaluated

    def _look(self, state: Any, position: Position) -> None:
        """Evaluates, where that is due."""
        run, step = self._run, position.step
        every = run.eval_every or run.total
        if run.evaluate is None or not (step % every == 0 or step == run.total):
            return
        losses = self._evaluate(state, position)
        if not losses:
            return
        loss = losses[0]
        if not (math.isfinite(loss) and (position.best is None or loss < position.best)):
            position.waited += 1
            return
        position.best, position.best_step, position.waited = loss, step, 0
        if self._best is not None and self._best.newest != step:  # a run that was killed evaluates
            self._best.save(step, state, {})  # again

    def _evaluate(self, state: Any, position: Position) -> list[float]:
        """Evaluates and says it; the losses of the sets."""
        assert self._run.evaluate is not None
        with self._log.apart():
            found = self._run.evaluate(state)
        for split, figures in found.items():
            self._log.evaluation(position.step, split, **figures)
            position.note_loss(split, position.step, figures["loss"])
            if not math.isfinite(figures["loss"]):
                note(f"warning: the {split} loss after step {position.step} is not finite")
        return [figures["loss"] for figures in found.values()]

    def _patience_lost(self, position: Position) -> bool:
        patience = self._run.early_stop
        return patience is not None and position.waited >= patience

    def _read(self, position: Position) -> None:
        """Waits for the figures of the step that was dispatched last, and says them."""
        if self._unread is None:
            return
        step, metrics, rows, tokens = self._unread
        self._unread = None
        metrics = jax.device_get(metrics)
        if not metrics.finite:
            self._not_finite(step, rows)
        elif metrics.skipped:
            note(f"step {step}: gradients overflowed float16; the next one scales the loss less")
        self._bad = 0 if metrics.finite else self._bad + 1
        rate = self._run.rate(step - 1 - position.skipped)
        position.skipped += int(metrics.skipped)
        figures = {"loss": metrics.loss, "lr": rate, "grad_norm": metrics.grad_norm}
        if position.skipped:
            figures["skipped"] = position.skipped
        figures = {name: float(value) for name, value in figures.items()}
        position.note_loss("training", step, figures["loss"])
        self._log.step(step, tokens, peak_bytes(self._run.device), **figures)

    def _not_finite(self, step: int, rows: list[str]) -> None:
        shown = "; ".join(rows[:_ROWS_SHOWN]) + ("; ..." if len(rows) > _ROWS_SHOWN else "")
        what = f"loss or gradient of step {step} is NaN or infinite; its rows: {shown}"
        if not self._run.skip_bad or self._bad + 1 == _BAD_IN_A_ROW:
            also = f" as in the {self._bad} steps before" if self._bad else ""
            raise InputError(
                what + also,
                "Such a step is not taken, the last checkpoint is from before it.",
                "Look at these rows, take a lower --lr, or leave such steps out: --nan-policy skip",
            )
        note(f"{what}; left out")
