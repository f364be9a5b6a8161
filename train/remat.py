"""Gradient checkpointing where no flag says how much: the fastest as measured, of what fits."""

from __future__ import annotations

import dataclasses

from convert.loading.folder import Folder
from glm2_jax.cli.messages import human_size, note
from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype
from infer.memory.budget import SPARE
from infer.memory.precision import Precision
from infer.memory.shortage import budget_of
from infer.tuning.automatic import AUTO, OFF, stored
from infer.tuning.measure import Tuned
from infer.tuning.training import WITHOUT_MEASURING
from train.data.batches import Batches
from train.devices import Devices
from train.memory import TrainingPlan, adapter_of
from train.recipe import Recipe
from train.run_folder.folder import recorded

FLAG = "--grad-checkpoint"


def find_tuned(recipe: Recipe, folder: Folder, devices: Devices) -> Tuned:
    """Return what was measured for a run on one device; nothing is measured now.

    On a mesh it is nothing: the files of several processes may differ, and they must agree.
    CheckpointError for a file of another device or model.
    """
    if devices.mesh is not None:
        if recipe.tuned not in (AUTO, OFF):
            note(f"warning: --tuned {recipe.tuned} is not used, a choice is for one device")
        return Tuned()
    precision = precision_of(recipe, folder, devices)
    return stored(recipe.tuned, folder.config, precision, devices.first)


def choose_remat(
    recipe: Recipe, folder: Folder, batches: Batches, devices: Devices, tuned: Tuned
) -> Recipe:
    """Return the recipe with `grad_checkpoint` decided, and report why.

    A flag decides, then the run that is resumed. On a mesh only an adapter has it: what is free may
    differ between processes, which must agree.
    """
    if recipe.training.grad_checkpoint is not None:
        return recipe
    output = recipe.output
    remat = recorded(output.checkpoints or output.output, FLAG) if output.resume == "auto" else None
    if remat is None:
        remat = "none" if recipe.adapter is None else "full"
        if devices.mesh is None:
            plan = plan_of(recipe, folder, batches, devices)
            remat, why = fastest(plan, budget_of(devices.first).memory, tuned)
            note(why)
    training = dataclasses.replace(recipe.training, grad_checkpoint=remat)
    return dataclasses.replace(recipe, training=training)


def plan_of(recipe: Recipe, folder: Folder, batches: Batches, devices: Devices) -> TrainingPlan:
    """Return the plan of a run on one device that keeps all activations."""
    accumulate, rows = batches.shape
    return TrainingPlan(
        folder.config, precision_of(recipe, folder, devices), rows, batches.width, "none",
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


def fastest(plan: TrainingPlan, memory: int | None, tuned: Tuned) -> tuple[str, str]:
    """Return what the backward pass of a run should recompute, one of `choices.REMAT`, and why.

    It is the fastest that was measured, of what fits the memory; where that was not measured, all
    activations are kept if they fit. None = the memory is not known.
    """

    def fits(policy: str) -> bool:
        needed = dataclasses.replace(plan, remat=policy).total
        return memory is not None and needed * SPARE <= memory

    usual = next(filter(fits, WITHOUT_MEASURING), WITHOUT_MEASURING[-1])
    free = "not known" if memory is None else human_size(memory)
    measured = tuned.trained(plan.batch, plan.length)
    # What did not fit there was not measured, and may be faster here.
    order = measured.order if measured is not None else []
    best = next(filter(fits, order), None) if usual in order else None
    if measured is None or best is None:
        return usual, (
            f"gradient checkpointing is {'off' if usual == 'none' else 'on'}: without it the run "
            f"needs about {human_size(plan.total)}; available: {free} "
            f"({'-' if usual == 'none' else '--no'}-grad-checkpoint turns it "
            f"{'on' if usual == 'none' else 'off'})"
        )
    seconds = measured.remat.choice.seconds
    gain = (
        "" if best == usual else f", {seconds[usual] / seconds[best]:.2f} times as fast as {usual}"
    )
    needed = human_size(dataclasses.replace(plan, remat=best).total)
    return best, (
        f"gradient checkpointing: {best}, the fastest of what fits as measured for "
        f"{measured.rows} x {measured.length} tokens{gain}; the run needs about {needed}, "
        f"available: {free} ({FLAG} chooses another)"
    )
