"""A sweep from its flags to its report: trial after trial in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optuna

from glm2_jax.cli.files import writer_lock
from glm2_jax.cli.messages import note
from glm2_jax.errors import GLMError, InputError, UsageError
from train import run as training
from train.data.dataset import open_dataset
from train.loop import NotFinite
from train.methods import first_adapter
from train.programs import Programs
from train.recipe import Recipe
from train.sweep.metrics import require_metric
from train.sweep.options import VAL_LOSS, SweepOptions
from train.sweep.plot import draw
from train.sweep.report import (
    FOLD,
    REASON,
    figures_of,
    lines,
    mean_and_error,
    summary,
    write_winner,
)
from train.sweep.space import Point, Space, edges, text
from train.sweep.study import FILE, Study, check_search
from train.sweep.trial import Base, Fold, prepared
from train.validation import VALIDATION

_LOCK, _TRIALS, _REPORT = ".lock", "trials", "report.json"
_FAILURES = 3  # in a row, after which no trial is worth another


def run(
    options: SweepOptions,
    space: Space,
    make: Callable[[Point], Recipe],
    job: int | None = None,
    start: Callable[[], int] | None = None,
) -> int:
    """Search the space, whose points `make` turns into recipes, and report; return the exit code.

    A `job` is one of several processes, which only runs trials; `start` starts them, waits, and
    returns an exit code. Raises GLMError for what the user can fix.
    """
    check_search(options, space)
    recipes = [make(point) for point in edges(space)]
    first = recipes[0]
    _check(first, options, space)
    folder = Path(first.output.output)
    seed = 0 if "seed" in space else first.training.seed
    identity = _identity([prepared(x, options, folder) for x in recipes], options, space, seed)
    _check_contents(folder)
    folder.mkdir(parents=True, exist_ok=True)
    resume = first.output.resume
    with (
        writer_lock(folder / (_LOCK if job is None else f"{_LOCK}-{job}"), folder),
        Study(folder, space, options, identity, seed=seed, resume=resume, job=job) as study,
    ):
        code = start() if start else _Sweep(options, space, make, folder, study, seed).run()
        if code or job is not None:
            return code
        return _report(study, options, space, make, folder)


def _check(recipe: Recipe, options: SweepOptions, space: Space) -> None:
    """Refuse flags of one run that make no sense for many."""
    data, output, evaluation = recipe.data, recipe.output, recipe.evaluation
    given = {
        "--plot": output.plot, "--log-jsonl": output.log_jsonl, "--checkpoints": output.checkpoints,
        "--check-data": data.check_data, "--print-sample": data.print_sample,
    }  # fmt: skip
    for flag, value in given.items():
        if value:
            fix = "Leave it out; train.lora has it."
            raise UsageError(f"{flag} belongs to one run, and a sweep makes many.", fix=fix)
    if options.folds and (evaluation.val_data is not None or evaluation.val_split):
        raise UsageError(
            "--folds excludes --val-data and --val-split.",
            "Each fold is validated on the rows that it does not train on.",
            "Leave one of them out.",
        )
    if "data" in space and evaluation.val_data is None:
        raise UsageError(
            "--space: data needs --val-data.",
            "Trials on other rows could not be compared on a part of them.",
            "Name the rows to compare them on: --val-data FILE.",
        )


def _identity(
    recipes: Sequence[Recipe], options: SweepOptions, space: Space, seed: int
) -> dict[str, Any]:
    """Return what the results of a study depend on; opens model and data, and makes the shapes of
    an adapter of each recipe, and so finds what is wrong with them."""
    recipe = recipes[0]
    folder = training.find_folder(recipe)
    for one in recipes:
        jax.eval_shape(lambda one=one: first_adapter(folder, one, one.adapter).lora)
    dataset = open_dataset(recipe.data, folder)
    _, sets = Fold(options, Programs(), seed=seed).split(recipe, folder, dataset)
    if options.metric != VAL_LOSS:
        require_metric(options.metric, sets[VALIDATION])
    found = training.identity_of(recipe, folder, dataset, sets)
    searched = {f"--{name}" for name in space} | ({"data"} & space.keys())
    own = {
        "space": {name: dataclasses.asdict(axis) for name, axis in space.items()},
        "--search": options.search, "--metric": options.metric, "--folds": options.folds,
        "--prune": options.prune, "seed": seed,
    }  # fmt: skip
    both = {name: x for name, x in found.items() if name not in searched} | own
    return json.loads(json.dumps(both))  # as it is read back


def _check_contents(folder: Path) -> None:
    if not folder.is_dir() or (folder / FILE).exists():
        return
    if others := sorted({path.name for path in folder.iterdir()} - {_LOCK}):
        raise UsageError(
            f"{folder} holds {', '.join(others[:5])}, but no study",
            "A sweep does not write into a folder with other files.",
            "Name a new folder: --output.",
        )


class _Sweep:
    """Runs the trials of a study, which share the frozen model and the compiled programs."""

    def __init__(
        self, options: SweepOptions, space: Space, make: Callable[[Point], Recipe], folder: Path,
        study: Study, seed: int,
    ):  # fmt: skip
        self._options, self._space, self._make, self._folder = options, space, make, folder
        self._study, self._seed = study, seed
        self._base, self._programs = Base(), Programs()
        # The first run decides on gradient checkpointing: later ones find its model in the memory.
        self._remat: str | None = None

    def run(self) -> int:
        """Run all trials; return 0, or the exit code of the signal that stopped one."""
        failures = 0
        while (trial := self._study.next()) is not None:
            shown = ", ".join(f"{name} {text(trial.params[name])}" for name in self._space)
            note(f"trial {trial.number} of {self._study.wanted}: {shown}")
            place = self._folder / _TRIALS / f"{trial.number:04}"
            value, failure = None, ""
            try:
                code = self._train(trial, place)
                if code:
                    return code
                figures = figures_of(self._study.trials[trial.number])
                value, error = mean_and_error([x[self._options.metric] for x in figures])
                more = "" if error is None else f" ± {error:.4f}"
                note(f"trial {trial.number}: {self._options.metric} {value:.4f}{more}")
                failures = 0
            except optuna.TrialPruned:
                note(f"trial {trial.number}: pruned, others had a lower loss at this point")
            except NotFinite as error:
                trial.set_user_attr(REASON, error.what)
                note(f"trial {trial.number}: {error.what}")
            except GLMError as error:
                failure, failures = error.cause, failures + 1
                trial.set_user_attr(REASON, failure)
                note(f"trial {trial.number} failed: {failure}")
                if failures == _FAILURES:
                    self._study.end(trial, failure=failure)
                    raise
            self._study.end(trial, value, failure)
            for made in place.rglob("state"):
                shutil.rmtree(made, ignore_errors=True)
        return 0

    def _train(self, trial: optuna.Trial, place: Path) -> int:
        """Train what a trial has not trained yet; return 0, or the exit code of a signal."""
        recipe, folds = self._make(point_of(self._space, trial.params)), self._options.folds or 1
        if recipe.training.grad_checkpoint is None:
            decided = dataclasses.replace(recipe.training, grad_checkpoint=self._remat)
            recipe = dataclasses.replace(recipe, training=decided)
        done = len(figures_of(self._study.trials[trial.number]))
        for number in range(done, folds):
            fold = Fold(
                self._options, self._programs, number=number, seed=self._seed,
                # The first fold decides whether the others are worth their time.
                report=None if number else lambda at, loss: self._study.report(trial, loss, at),
            )  # fmt: skip
            where = place / f"{FOLD}{number}" if folds > 1 else place
            code = training.run(prepared(recipe, self._options, where), self._base, fold)
            if code:
                return code
            self._remat = fold.remat
            trial.set_user_attr(f"{FOLD}{number}", fold.figures)
        return 0


def point_of(space: Space, params: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of a trial as they are written in a recipe."""
    return {name: text(params[name]) for name in space}


def _report(
    study: Study, options: SweepOptions, space: Space, make: Callable[[Point], Recipe], folder: Path
) -> int:
    """Print what was found, and write it into the folder."""
    best = study.best
    if best is None:
        reasons = [trial.user_attrs.get(REASON, "pruned") for trial in study.trials]
        raise InputError(
            f"none of the {len(reasons)} trials has a result",
            f"the last one: {reasons[-1]}",
            "Change the space, or --prune none; use another --output.",
        )
    command = write_winner(make(point_of(space, best.params)), folder)
    found = summary(study, options, command)
    report = json.dumps(found, ensure_ascii=False)
    (folder / _REPORT).write_text(report + "\n", encoding="utf-8")
    pictures = draw(found, space, folder)
    print(report if options.json else "\n".join(lines(found)))
    note(f"pictures: {', '.join(pictures)}")
    return 0
