"""What a sweep found: as values for JSON, as a table, and as a command that trains the winner."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import optuna
import yaml
from optuna.trial import TrialState

from glm2_jax.cli.commands import as_typed
from glm2_jax.cli.tables import table
from train.recipe import Recipe
from train.sweep.options import VAL_LOSS, SweepOptions
from train.sweep.space import text
from train.sweep.study import Study

FOLD, REASON = "fold", "reason"  # of user attributes: "fold0" has the figures of the first fold
WINNER = "best.yml"


def figures_of(trial: optuna.trial.FrozenTrial) -> list[dict[str, float]]:
    """Return the figures of each fold that has ended."""
    attributes, found = trial.user_attrs, []
    while (figures := attributes.get(f"{FOLD}{len(found)}")) is not None:
        found.append(figures)
    return found


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Return the mean, and its standard error where there are several values."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return fmean(values), error


def summary(study: Study, options: SweepOptions, command: str) -> dict[str, Any]:
    """Return all that was found; the trials are sorted, the best first."""
    sign = -1 if options.maximize else 1
    trials = sorted(
        (_trial(trial, options.metric) for trial in study.trials if trial.state.is_finished()),
        key=lambda x: (x["value"] is None, sign * (x["value"] or 0), x["number"]),
    )
    return {
        "study": str(study.path), "search": options.search, "metric": options.metric,
        "better": "higher" if options.maximize else "lower", "folds": options.folds or 1,
        "trials": trials, "importance": study.importance(), "command": command,
    }  # fmt: skip


def _trial(trial: optuna.trial.FrozenTrial, metric: str) -> dict[str, Any]:
    figures, done = figures_of(trial), trial.state == TrialState.COMPLETE
    value, error = mean_and_error([x[metric] for x in figures]) if done else (None, None)
    losses, last = [x[VAL_LOSS] for x in figures], trial.last_step
    if not losses and last is not None:
        losses = [abs(trial.intermediate_values[last])]
    return {
        "number": trial.number, "state": trial.state.name.lower(), "value": value,
        "standard_error": error, "val_loss": fmean(losses) if losses else None,
        "values": [x[metric] for x in figures],
        "settings": {name: _rounded(x) for name, x in trial.params.items()},
        "reason": trial.user_attrs.get(REASON),
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    return float(text(value)) if isinstance(value, float) else value


def lines(found: dict[str, Any]) -> list[str]:
    """Return the table of a summary, and the lines after it."""
    metric, names = found["metric"], list(found["trials"][0]["settings"])
    others = [] if metric == VAL_LOSS else ["val_loss"]
    rows = [["trial", "state", *names, *others, metric]]
    for one in found["trials"]:
        error = one["standard_error"]
        shown = "-" if one["value"] is None else f"{one['value']:.4f}"
        losses = ["-" if one["val_loss"] is None else f"{one['val_loss']:.4f}" for _ in others]
        if one["value"] is None and metric == VAL_LOSS and one["val_loss"] is not None:
            shown = f"({one['val_loss']:.4f})"
        settings = [text(one["settings"].get(name, "-")) for name in names]
        shown += "" if error is None else f" ± {error:.4f}"
        rows.append([str(one["number"]), one["state"], *settings, *losses, shown])
    result = table(rows, 2)
    reasons = [f"trial {x['number']}: {x['reason']}" for x in found["trials"] if x["reason"]]
    if found["importance"]:
        shares = ", ".join(f"{name} {x:.2f}" for name, x in found["importance"].items())
        result += ["", f"importance: {shares}"]
    return [*result, *reasons, "", "train the best on all rows:", f"  {found['command']}"]


def write_winner(recipe: Recipe, folder: Path) -> str:
    """Write the recipe that trains on all rows of --data, and return the command that does."""
    evaluation = dataclasses.replace(recipe.evaluation, val_split=0.0)
    if evaluation.val_data is None:  # nothing is left to evaluate on
        evaluation = dataclasses.replace(evaluation, early_stop=None)
    settings = dataclasses.replace(recipe, evaluation=evaluation).settings()
    for name in ("output", "resume"):
        del settings[name]
    path = folder / WINNER
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    new.replace(path)
    config, place = shlex.quote(str(path)), shlex.quote(f"{folder}-best")
    return as_typed(f"python -m train.lora --config {config} --output {place}")
