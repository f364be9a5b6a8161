"""Default numbers that depend on data and model, so that few rows and small models learn, too."""

from __future__ import annotations

import dataclasses
import math

from glm2_jax.cli.messages import note
from train.recipe import Recipe
from train.run_folder.folder import free_place

MICRO_BATCHES, EPOCHS = 8, 3  # per step, and per run, where there are rows enough
WANTED_STEPS, FEW_STEPS = 200, 50
WIDTH = 4096  # hidden size of the models that the default learning rates are meant for


def choose(recipe: Recipe, parts: int, hidden_size: int) -> Recipe:
    """Return the recipe with a number in place of each None, and report which were chosen.

    They depend on `parts`, the micro-batches in an epoch, and on the model's hidden size.
    """
    training = recipe.training
    accumulate = training.grad_accum or _micro_batches(parts)
    found = {
        "lr": float(f"{recipe.default_lr * WIDTH / hidden_size:.2g}"),
        "grad_accum": accumulate,
        "epochs": None if training.steps is not None else _epochs(parts, accumulate),
    }
    chosen = {
        name: value
        for name, value in found.items()
        if value is not None and getattr(training, name) is None
    }
    if chosen:
        note(f"chosen for this data and model: {_flags(**chosen)}")
    return dataclasses.replace(recipe, training=dataclasses.replace(training, **chosen))


def warn_of_few_steps(recipe: Recipe, parts: int, steps: int) -> None:
    """Say how to take more steps, where a run has too few to learn much."""
    if steps >= FEW_STEPS:
        return
    accumulate = _micro_batches(parts)
    longer = {"grad_accum": accumulate, "epochs": _epochs(parts, accumulate)}
    remedy = _flags(**(longer if recipe.training.steps is None else {"steps": WANTED_STEPS}))
    note(
        f"warning: only {steps} optimizer step{'s' * (steps > 1)}, too few to learn much. "
        f"Try {remedy} {free_place(recipe.output.output, recipe.output.checkpoints)}"
    )


def _micro_batches(parts: int) -> int:
    """Return the most micro-batches per step with which `EPOCHS` epochs have the wanted steps."""
    return min(max(EPOCHS * parts // WANTED_STEPS, 1), MICRO_BATCHES)


def _epochs(parts: int, accumulate: int) -> float:
    return float(max(EPOCHS, math.ceil(WANTED_STEPS / math.ceil(parts / accumulate))))


def _flags(**values: float) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in values.items())
