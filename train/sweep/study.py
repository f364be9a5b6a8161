"""The trials of a sweep in a SQLite file: what comes next, whatever ended the process before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy.exc
from filelock import FileLock
from optuna.trial import TrialState

from glm2_jax.errors import InputError, UsageError, shorten
from train.data.plan import random_order
from train.sweep.options import TRIALS, SweepOptions
from train.sweep.space import Choices, Range, Space, grid_point, grid_size

FILE = "study.db"
_IDENTITY, _JOB = "identity", "job"  # attributes of the study, and of a trial
_ASKING = ".lock-next"  # held while a process chooses its next trial
_FEW = 4  # complete trials, from which importance is computed
_PATIENCE = 100  # seconds to wait while another process writes
_STORAGE = optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError
_REDUCTION = 3  # of so many trials one goes on
ROUNDS = _REDUCTION**2  # evaluations of a run


class Study:
    """The trials of a search in a space.

    The numbers that a search draws depend on the seed and on the number of the trial alone, so a
    study that was killed tries the same points as one that was not (with several jobs, the order in
    which trials end matters, too). `identity` is what its results
    depend on, as JSON values.

    Raises UsageError where the file holds a study of another identity, or any with `resume="none"`;
    InputError where it is no study.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        options: SweepOptions,
        identity: Mapping[str, Any],
        *,
        seed: int,
        resume: str,
        job: int | None = None,
    ):
        self._job, self._lock = job, FileLock(folder / _ASKING)
        self.path, self.space, self._options, self._seed = folder / FILE, space, options, seed
        size = grid_size(space) if options.search == "grid" else None
        self.wanted = options.trials or size or TRIALS
        if size is not None:
            self.wanted = min(self.wanted, size)
            self._order = random_order(size, seed)
        halving = optuna.pruners.SuccessiveHalvingPruner(1, _REDUCTION)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            patient = {"connect_args": {"timeout": _PATIENCE}}
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{self.path}", patient)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name="sweep",
                direction="maximize" if options.maximize else "minimize",
                pruner=halving if options.prune == "halving" else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
            known = self._study.user_attrs.get(_IDENTITY)
        except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError) as error:
            raise self._unusable(error, "Name another --output.") from error
        if known is None:
            self._study.set_user_attr(_IDENTITY, dict(identity))
        else:
            self._check(known, identity, resume)

    def __enter__(self) -> Study:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()
        if isinstance(error, _STORAGE):  # the disk is full, or the file was changed
            raise self._unusable(
                error, "Correct that, then continue with --resume auto."
            ) from error

    def _unusable(self, error: BaseException, fix: str) -> InputError:
        reason = str(error.__cause__ or error).splitlines()[0][:300]
        return InputError(f"{self.path} cannot be used as a study", reason, fix)

    def _check(self, known: Mapping[str, Any], identity: Mapping[str, Any], resume: str) -> None:
        changed = [
            f"{name} was {shorten(known.get(name))} and is {shorten(identity.get(name))}"
            for name in sorted({*known, *identity})
            if known.get(name) != identity.get(name)
        ]
        if changed:
            raise UsageError(
                f"{self.path} holds another study: {'; '.join(changed)}",
                "Trials of both could not be compared, and nothing is overwritten.",
                "Give the earlier space, flags and files, or name another --output.",
            )
        if resume == "none" and self.trials:
            raise UsageError(
                f"{self.path} holds a study already, of {len(self.trials)} trials",
                "Nothing is overwritten.",
                "Resume it: --resume auto. Or name another --output.",
            )

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All trials, by their numbers."""
        return self._study.get_trials(deepcopy=False)

    @property
    def best(self) -> optuna.trial.FrozenTrial | None:
        """The best of the complete trials, if there is one."""
        complete = any(trial.state == TrialState.COMPLETE for trial in self.trials)
        return self._study.best_trial if complete else None

    def next(self) -> optuna.Trial | None:
        """Return the trial to run, with a value for each setting: one that a killed process was
        running, or a new one; None where all are done."""
        with self._lock:
            trial = self._begun() or self._new()
            if trial is not None:
                for name, axis in self.space.items():
                    _suggest(trial, name, axis)
        return trial

    def _begun(self) -> optuna.Trial | None:
        """Return a trial that was running in a process of the same job."""
        for trial in self.trials:
            job = trial.user_attrs.get(_JOB, 0) % self._options.jobs
            if trial.state == TrialState.RUNNING and self._job in (None, job):
                self._study.sampler = self._sampler(trial.number)
                return optuna.Trial(self._study, trial._trial_id)
        return None

    def _new(self) -> optuna.Trial | None:
        trials = self.trials
        waiting = [trial.number for trial in trials if trial.state == TrialState.WAITING]
        number = waiting[0] if waiting else len(trials)
        if number >= self.wanted:
            return None
        self._study.sampler = self._sampler(number)
        if self._options.search == "grid" and not waiting:
            self._study.enqueue_trial(grid_point(self.space, int(self._order[number])))
        trial = self._study.ask()
        if self._job is not None:
            trial.set_user_attr(_JOB, self._job)
        return trial

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = int(np.random.SeedSequence((self._seed, number)).generate_state(1)[0])
        if self._options.search == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        if self._options.search == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return optuna.samplers.RandomSampler(seed)

    def report(self, trial: optuna.Trial, loss: float, step: int) -> None:
        """Record a validation loss of a trial; raises TrialPruned where the trial is hopeless."""
        seen = self._storage.get_trial(trial._trial_id).intermediate_values
        if step not in seen:  # else a killed process reported it
            trial.report(-loss if self._options.maximize else loss, step)
        if step >= max(seen, default=0) and trial.should_prune():
            raise optuna.TrialPruned

    def end(self, trial: optuna.Trial, value: float | None = None, failure: str = "") -> None:
        """Record the outcome of a trial: its value; with None it was pruned, or failed."""
        if value is not None and math.isfinite(value):
            self._study.tell(trial, value)
        else:
            state = TrialState.FAIL if failure else TrialState.PRUNED
            self._study.tell(trial, state=state)

    def importance(self) -> dict[str, float]:
        """Return how much each setting mattered, with a sum of 1 (PED-ANOVA); {} for few trials."""
        values = [trial.value for trial in self.trials if trial.state == TrialState.COMPLETE]
        if len(values) < _FEW or len(set(values)) == 1:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return optuna.importance.get_param_importances(self._study, evaluator=evaluator)


def check_search(options: SweepOptions, space: Space) -> None:
    """Raise UsageError where the search cannot search the space."""
    if options.search == "grid":
        grid_size(space)
    ranges = [name for name, axis in space.items() if isinstance(axis, Range)]
    if options.search == "cmaes" and len(ranges) < 2:
        raise UsageError(
            f"--search cmaes needs two or more ranges, got {len(ranges)}.",
            "Values of a list are drawn at random there.",
            "Write ranges, NAME=LOW..HIGH, or use --search tpe.",
        )


def _suggest(trial: optuna.Trial, name: str, axis: Choices | Range) -> None:
    """Draw a value, if the trial does not have one."""
    if isinstance(axis, Choices):
        trial.suggest_categorical(name, axis.values)
    elif axis.whole:
        trial.suggest_int(name, round(axis.low), round(axis.high), log=axis.log)
    else:
        trial.suggest_float(name, axis.low, axis.high, log=axis.log)
