"""`python -m train.lora --dry-run`: what a training run takes of a device.

No weights and no data are read; the device need not be here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from convert.loading.folder import open_folder, read_config
from glm2_jax.cli.main import EXIT_DEVICE
from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.tables import columns, fold, table
from glm2_jax.config import PRESETS, GLMConfig
from glm2_jax.escape import join_lines
from glm2_jax.mesh import mesh_text, parse_mesh
from glm2_jax.schemes import SCHEMES, asked_scheme
from glm2_jax.sharding import check_mesh
from infer.engine.load import demo_folder
from infer.memory.budget import Budget, find_budget
from infer.memory.cards import CARDS, MESHES, find_links
from infer.memory.precision import precisions
from infer.memory.shares import Sizes, sizes_of
from infer.startup import find_choice
from infer.tuning.training import WITHOUT_MEASURING
from train import compiler
from train.data.dataset import counted, widest_row
from train.defaults import MICRO_BATCHES
from train.memory import TrainingPlan, adapter_of
from train.recipe import Recipe


def run(recipe: Recipe) -> int:
    """Print the plans; returns 5 where none fits, else 0. Raises GLMError for a model, mesh or
    device that is not known."""
    name, config, stored = _model(recipe)
    budget, mesh = _place(recipe)
    plans = _plans(recipe, name, config, stored, budget, mesh)
    for line in _render(recipe, name, plans, budget):
        print(join_lines(fold(line, columns(100)) if "  " not in line else [line]), flush=True)
    if mesh is None and compiler.knows(recipe.choice.device):
        wanted = _wanted(plans, budget)
        note(f"compiling the step of {_called(wanted)} for {recipe.choice.device}")
        peak, problem = compiler.ask(wanted, recipe.choice.device)
        said = problem if peak is None else f"{human_size(peak + wanted.runtime)} in total"
        print(f"the compiler's own figure for {_called(wanted)}: {said}")
    return 0 if any(_fits(plan, budget) is not False for plan in plans) else EXIT_DEVICE


def _model(recipe: Recipe) -> tuple[str, GLMConfig, str | None]:
    """Return the name, configuration and stored quantization of the model: a published name, a
    config.json, or a folder."""
    choice = recipe.choice
    if choice.path is not None and not Path(choice.path).is_dir():
        if choice.path in PRESETS or Path(choice.path).exists():
            return choice.path, *read_config(choice.path, choice.rope_kind, choice.family)
    found = open_folder(find_choice(choice).path or demo_folder(), **choice.form)
    stored = None if found.scheme is None else found.scheme.name
    return choice.path or "the demo model", found.config, stored


def _place(recipe: Recipe) -> tuple[Budget, Sizes | None]:
    """Return the budget of each device that the flags name, and the mesh of them; where several
    devices are named without one, they are all on its axis fsdp."""
    name = recipe.choice.device
    sizes = None if recipe.choice.mesh is None else parse_mesh(recipe.choice.mesh)
    if match := None if name in CARDS else re.fullmatch(MESHES, name):
        if sizes is None:
            sizes = parse_mesh(f"fsdp={match[1] or match[3] or 1}")
        name = find_links(name, math.prod(sizes.values())).card.name
    return find_budget(name), None if sizes is None else sizes_of(sizes)


def _plans(
    recipe: Recipe,
    name: str,
    config: GLMConfig,
    stored: str | None,
    budget: Budget,
    mesh: Sizes | None,
) -> list[TrainingPlan]:
    """Return a plan for every precision that the flags leave open, keeping and recomputing all
    activations if they leave that open, the preferred one first."""
    choice, training = recipe.choice, recipe.training
    scheme = asked_scheme(choice.quantize, False, stored=stored, model=name)
    if recipe.adapter is None:
        chosen = budget.precisions(None, choice.dtype, "none")
    elif choice.dtype == "auto" and scheme is None:
        first = budget.precisions(stored, "auto", None)
        smaller = precisions(budget.half, stored)
        chosen = (*first, *(one for one in smaller if one.quantize and one not in first))
    else:
        chosen = budget.precisions(stored, choice.dtype, scheme)
    if mesh is not None:
        for precision in chosen:
            check_mesh(config, dict(mesh), SCHEMES.get(precision.quantize or ""))
    asked = training.grad_checkpoint
    return [
        TrainingPlan(
            config, precision, training.batch_size, widest_row(recipe.data, config), remat,
            adapter_of(recipe), training.grad_accum or MICRO_BATCHES, budget.platform, mesh,
        )
        for precision in chosen
        for remat in (WITHOUT_MEASURING if asked is None else (asked,))
    ]  # fmt: skip


def _fits(plan: TrainingPlan, budget: Budget) -> bool | None:
    return None if budget.memory is None else plan.total <= budget.memory


def _wanted(plans: Sequence[TrainingPlan], budget: Budget) -> TrainingPlan:
    """Return what a run with these flags would take: its precision, with all activations kept where
    that fits."""
    same = [plan for plan in plans if plan.precision == plans[0].precision]
    return next((plan for plan in same if _fits(plan, budget)), same[-1])


def _render(
    recipe: Recipe, name: str, plans: Sequence[TrainingPlan], budget: Budget
) -> Iterator[str]:
    first = plans[0]
    memory = "memory unknown" if budget.memory is None else f"{human_size(budget.memory)} to use"
    what = "all parameters" if first.adapter is None else first.adapter
    where = budget.name
    if first.mesh is not None:
        where = f"each device of {mesh_text(dict(first.mesh))} ({budget.name})"
    yield f"{name}, training {what} on {where}: {memory}"
    yield (
        f"{counted(first.batch, 'row')} of {first.length:,} tokens per micro-batch, "
        f"{first.accumulate} micro-batch{'es' * (first.accumulate != 1)} per step"
    )
    yield ""
    head = ("weights in", "recompute", "base", "trained", "activations", "total", "fits")
    rows = [
        (
            plan.precision.name,
            plan.remat,
            *map(human_size, (plan.weights, plan.state + plan.gradients, plan.activations)),
            human_size(plan.total),
            {True: "yes", False: "no", None: "?"}[_fits(plan, budget)],
        )
        for plan in plans
    ]
    yield from table([head, *rows], texts=2)
    yield ""
    yield (
        "trained: parameters, Adam's moments and gradients; activations: what the backward pass "
        "needs, counted in the traced step, and calculated for the layer and the logits at work; "
        "the total includes jax's own memory. recompute: --grad-checkpoint; full where the rest "
        "does not fit, if infer.tune --train has not measured what is faster"
    )
    if _fits(wanted := _wanted(plans, budget), budget) is False:
        found = (
            "; ".join(_changes(plans, wanted, budget)) or "no smaller batch, length or precision"
        )
        yield f"{_called(wanted)} does not fit. What fits: {found}"


def _changes(plans: Sequence[TrainingPlan], wanted: TrainingPlan, budget: Budget) -> Iterator[str]:
    """Yield what fits instead, as flags: another precision, fewer rows, shorter rows."""
    if plan := next((plan for plan in plans if _fits(plan, budget)), None):
        yield _flags(plan, wanted)
    fixed = [plan for plan in plans if plan.total - plan.activations <= (budget.memory or 0)]
    if not fixed:  # whatever the rows
        return
    smaller = replace(wanted, remat="full", precision=fixed[0].precision)
    batches = (wanted.batch >> power for power in range(1, wanted.batch.bit_length()))
    shorter = (wanted.length >> power for power in range(1, wanted.length.bit_length() - 5))
    for choices in (
        [replace(smaller, batch=rows) for rows in batches],
        [replace(smaller, length=length) for length in shorter],
    ):
        if plan := next((plan for plan in choices if _fits(plan, budget)), None):
            yield _flags(plan, wanted)


def _flags(plan: TrainingPlan, wanted: TrainingPlan) -> str:
    """Return the flags that ask for a plan instead of the wanted one, and its total."""
    found = []
    if plan.precision.dtype != wanted.precision.dtype:
        found.append(f"--dtype {plan.precision.dtype}")
    if plan.precision.quantize != wanted.precision.quantize:
        found.append(f"--quantize-base {plan.precision.name}")
    if plan.remat != wanted.remat:
        found.append(f"--grad-checkpoint {plan.remat}")
    if plan.batch != wanted.batch:
        found.append(f"--batch-size {plan.batch}")
    if plan.length != wanted.length:
        found.append(f"--max-length {plan.length}")
    return f"{' '.join(found)} ({human_size(plan.total)})"


def _called(plan: TrainingPlan) -> str:
    return f"{plan.precision.name}{' with recomputing' if plan.remat != 'none' else ''}"
