"""The form of attention of a training run: what `infer.tune` measured for complete texts."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from convert.loading.folder import Folder
from glm2_jax import GLMConfig
from glm2_jax.attention import candidates
from glm2_jax.cli.messages import note
from glm2_jax.errors import UsageError
from glm2_jax.forms import Attention, Forms
from infer.tuning.measure import USUAL, Tuned
from train.data.batches import Batches
from train.devices import Devices
from train.recipe import Recipe
from train.remat import precision_of
from train.run_folder.folder import recorded

FLAG = "--attention"
_TEXT = Attention(512, 512, whole=True)  # a choice counts for any length


def choose_attention(
    recipe: Recipe, folder: Folder, devices: Devices, tuned: Tuned, batches: Batches
) -> Recipe:
    """Return the recipe with the form of attention decided, and report another than the usual one.

    A flag decides, then the run that is resumed, which stays bit-identical, then what was measured
    on this device. UsageError for a form that this device or dtype does not have.
    """
    asked, output = recipe.training.attention, recipe.output
    if asked is None and devices.mesh is not None:
        return recipe
    precision = precision_of(recipe, folder, devices)
    known = candidates(devices.first.platform, jnp.dtype(precision.dtype), _TEXT)
    if asked is not None:
        if asked in (USUAL, *known):
            return recipe
        raise UsageError(
            f"{FLAG} {asked} is not available for {precision.dtype} on this device.",
            fix=f"Here it is one of {', '.join((USUAL, *known))}.",
        )
    run = output.checkpoints or output.output
    if output.resume == "auto" and recorded(run, "command") is not None:
        found = recorded(run, FLAG)
    else:
        found = measured_form(tuned, batches.shape[1], batches.width)
    if found not in known:
        return recipe
    note(f"attention is computed in the form {found}, as measured ({FLAG} {USUAL}: not)")
    training = dataclasses.replace(recipe.training, attention=found)
    return dataclasses.replace(recipe, training=training)


def measured_form(tuned: Tuned, rows: int, length: int) -> str | None:
    """Return the fastest form for a batch as measured in training, else in complete texts at all;
    None = the usual one."""
    measured = tuned.trained(rows, length)
    return tuned.forms.of_attention(_TEXT) if measured is None else measured.form


def with_attention(config: GLMConfig, form: str | None) -> GLMConfig:
    """Return the configuration with the chosen form for the texts of a batch."""
    if form in (None, USUAL):
        return config
    return dataclasses.replace(config, forms=Forms(attention=((_TEXT, form),)))
