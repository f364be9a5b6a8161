"""One trial: a training run for its point, or one for each fold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert import Checkpoint
from convert.loading.folder import Folder
from glm2_jax.cli.model_choice import ModelChoice
from train.data.dataset import Dataset
from train.devices import Devices
from train.loop import NotFinite, Position
from train.methods import AdapterMethod, Method, load_base
from train.programs import Programs
from train.recipe import Recipe
from train.run import Sets, Watcher, split_sets
from train.sweep.folds import split_fold
from train.sweep.metrics import score_answers
from train.sweep.options import VAL_LOSS, VAL_SPLIT, SweepOptions
from train.sweep.study import ROUNDS
from train.validation import VALIDATION, Figures


class Fold(Watcher):
    """A training of a trial; `report` takes the number of an evaluation and its loss, except that
    of the last one, and may raise. At the end `figures` has the validation loss and the metric of
    the result, and `remat` what the run recomputed."""

    advises = False

    def __init__(
        self,
        options: SweepOptions,
        programs: Programs,
        *,
        number: int = 0,
        seed: int,
        report: Callable[[int, float], None] | None = None,
    ):
        super().__init__(programs)
        self._options, self._number, self._seed, self._report = options, number, seed, report
        self.figures: dict[str, float] = {}
        self.remat: str | None = None

    def split(self, recipe: Recipe, folder: Folder, dataset: Dataset) -> tuple[Dataset, Sets]:
        """As in any run, but the same rows for all seeds; or the rows of a fold."""
        folds = self._options.folds
        share = 0.0 if folds else recipe.evaluation.val_split
        recipe = dataclasses.replace(
            recipe,
            training=dataclasses.replace(recipe.training, seed=self._seed),
            evaluation=dataclasses.replace(recipe.evaluation, val_split=share),
        )
        learned, sets = split_sets(recipe, folder, dataset)
        if folds:
            learned, held = split_fold(dataset, self._number, folds, self._seed)
            sets = {VALIDATION: held, **sets}
        return learned, sets

    def planned(self, recipe: Recipe, total: int) -> Recipe:
        """Evaluate as often as pruning needs it."""
        every = recipe.evaluation.eval_every or math.ceil(total / ROUNDS)
        self._every, self._total = every, total
        self.remat = recipe.training.grad_checkpoint
        evaluation = dataclasses.replace(recipe.evaluation, eval_every=every)
        return dataclasses.replace(recipe, evaluation=evaluation)

    def evaluated(self, step: int, figures: Figures) -> None:
        if self._report is not None and 0 < step < self._total:
            self._report(math.ceil(step / self._every), figures[VALIDATION]["loss"])

    def finished(self, method: Method, trained: Any, sets: Sets, position: Position) -> None:
        loss = position.losses[VALIDATION][-1][1] if position.best is None else position.best
        if loss is None:
            raise NotFinite("the validation loss of the result is NaN or infinite")
        self.figures = {VAL_LOSS: loss}
        metric = self._options.metric
        if metric != VAL_LOSS:
            of = sets[VALIDATION]
            self.figures[metric] = score_answers(metric, method, trained, of, self.programs)


class Base:
    """Makes the method of each run; the frozen model is read once for runs that share it."""

    def __init__(self) -> None:
        self._key: Any = None
        self._checkpoint: Checkpoint | None = None

    def __call__(self, folder: Folder, recipe: Recipe, devices: Devices, progress: Any) -> Method:
        return AdapterMethod(folder, recipe, devices, progress, self._load)

    def _load(
        self, folder: Folder, choice: ModelChoice, devices: Devices, progress: Any
    ) -> Checkpoint:
        key = str(folder.path), choice
        if self._checkpoint is None or key != self._key:
            self._checkpoint = None  # free it first
            self._checkpoint, self._key = load_base(folder, choice, devices, progress), key
        return self._checkpoint


def prepared(recipe: Recipe, options: SweepOptions, place: Path) -> Recipe:
    """Return the recipe of a run with what the sweep decides: its folder and its validation rows.
    The share of a fold is that of its rows."""
    evaluation = recipe.evaluation
    share = 1 / options.folds if options.folds else evaluation.val_split
    if not share and evaluation.val_data is None:
        share = VAL_SPLIT
    output = dataclasses.replace(recipe.output, output=str(place), resume="auto", keep=1)
    return dataclasses.replace(
        recipe, output=output, evaluation=dataclasses.replace(evaluation, val_split=share)
    )
