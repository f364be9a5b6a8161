"""Gradient checkpointing where no flag says whether: only if the activations do not fit."""

from __future__ import annotations

import dataclasses

from convert.loading.folder import Folder
from glm2_jax.cli.messages import human_size, note
from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype
from infer.memory.budget import SPARE
from infer.memory.precision import Precision
from infer.memory.shortage import budget_of
from train.data.batches import Batches
from train.devices import Devices
from train.memory import TrainingPlan, adapter_of
from train.recipe import Recipe
from train.run_folder.folder import recorded

FLAG = "--grad-checkpoint"


def choose_remat(recipe: Recipe, folder: Folder, batches: Batches, devices: Devices) -> Recipe:
    """Return the recipe with `grad_checkpoint` decided, and report why.

    A flag decides, then the run that is resumed. On a mesh only an adapter has it: what is free may
    differ between processes, which must agree.
    """
    if recipe.training.grad_checkpoint is not None:
        return recipe
    output = recipe.output
    remat = recorded(output.checkpoints or output.output, FLAG) if output.resume == "auto" else None
    if remat is None:
        remat = recipe.adapter is not None
        if devices.mesh is None:
            remat = _needed(plan_of(recipe, folder, batches, devices), devices)
    training = dataclasses.replace(recipe.training, grad_checkpoint=remat)
    return dataclasses.replace(recipe, training=training)


def plan_of(recipe: Recipe, folder: Folder, batches: Batches, devices: Devices) -> TrainingPlan:
    """Return the plan of a run on one device that keeps all activations."""
    accumulate, rows = batches.shape
    return TrainingPlan(
        folder.config, precision_of(recipe, folder, devices), rows, batches.width, False,
        adapter_of(recipe), accumulate, devices.first.platform,
    )  # fmt: skip


def precision_of(recipe: Recipe, folder: Folder, devices: Devices) -> Precision:
    """Return what a run computes in, and how the base of an adapter is quantized."""
    choice = recipe.choice
    stored = None if folder.scheme is None else folder.scheme.name
    scheme = choice.quantize or stored
    scheme = None if scheme == "none" or recipe.adapter is None else scheme
    params = folder.config.num_params
    dtype = resolve_dtype(choice.dtype, num_params=params, device=devices.first)
    return Precision(dtype_name(dtype), scheme)


def _needed(plan: TrainingPlan, devices: Devices) -> bool:
    """Return whether the activations do not fit, and say so."""
    memory = budget_of(devices.first).memory
    free = "not known" if memory is None else human_size(memory)
    needed = memory is None or plan.total * SPARE > memory
    note(
        f"gradient checkpointing is {'on' if needed else 'off'}: without it the run needs about "
        f"{human_size(plan.total)}; available: {free} ({'--no' if needed else '-'}-grad-checkpoint "
        f"turns it {'off' if needed else 'on'})"
    )
    return needed
