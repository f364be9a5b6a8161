"""Finds the forms for a model on a device: kept ones, a file's, or newly measured ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convert.loading.folder import Folder, target_scheme
from glm2_jax import GLMConfig
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.errors import CheckpointError
from glm2_jax.forms import Forms
from glm2_jax.runtime.devices import faster_layers
from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype
from glm2_jax.runtime.machine import cores, load_average
from infer.memory.precision import Precision
from infer.tuning import store
from infer.tuning.measure import Tuned, tune

AUTO, OFF = "auto", "off"
# With fewer parameters, there is nothing worth waiting for.
_SMALL = 10**8
# A machine that has so many times as much to do as it has cores measures nothing but that.
_BUSY = 2
# A narrower dtype has to be so much faster before it is preferred.
_FASTER = 0.9

Note = Callable[[str], None]


def find_forms(
    folder: Folder,
    choice: ModelChoice,
    options: EngineOptions,
    device: Any,
    rows: int,
    note: Note | None,
) -> tuple[ModelChoice, Forms]:
    """Return the choice with what is faster where it says nothing, and the forms.

    On a CPU, where float32 and bfloat16 are both possible, the dtype "auto" is the faster one;
    the layout of the layers is the one that was measured as faster. What is not
    known yet is measured, and kept, if `note`, which gets lines for the user, is not None.

    Raises CheckpointError if `options.tuned` is a file of another device or model.
    """
    if options.tuned == OFF:
        return choice, Forms()
    scheme = target_scheme(folder, choice.quantize, choice.quantize_embeddings)
    params = folder.config.num_params
    first = dtype_name(resolve_dtype(choice.dtype, num_params=params, device=device))
    names = [first]
    if choice.dtype == AUTO and device.platform == "cpu" and first == "float32":
        names.append("bfloat16")
    precisions = [Precision(name, None if scheme is None else scheme.name) for name in names]
    if options.tuned != AUTO:
        return _from_file(options.tuned, folder, choice, precisions, device)
    config, steps = folder.config, sorted({1, min(4, rows), rows})  # few rows are computed alone
    found = {
        precision.dtype: known(config, precision, steps, device, choice.layers, note)
        for precision in precisions
    }
    best, narrow, wide = first, found[names[-1]].seconds, found[first].seconds
    if 0 < narrow < _FASTER * wide:
        best = names[-1]
        if note is not None:
            note(
                f"computing in {best}: layers took {narrow * 1e3:.2g} ms a step in it, "
                f"{wide * 1e3:.2g} ms in {first}"
            )
        choice = dataclasses.replace(choice, dtype=best)
    return _with_layers(choice, found[best])


def _with_layers(choice: ModelChoice, tuned: Tuned) -> tuple[ModelChoice, Forms]:
    return dataclasses.replace(choice, layers=choice.layers or tuned.layers), tuned.forms


def known(
    config: GLMConfig,
    precision: Precision,
    rows: Sequence[int],
    device: Any,
    layers: str | None,
    note: Note | None,
) -> Tuned:
    """Return what was measured for steps of so many rows, or measure it, see `find_forms`; nothing
    for a model that is too small to gain by it."""
    if config.num_params < _SMALL:
        return Tuned()
    key = store.key_of(config, precision, device)
    found = store.find(key)
    if found is not None and set(rows) <= set(found.rows):
        return found
    if note is None:
        return found or Tuned()
    if (load := load_average()) > _BUSY * cores():
        note(f"the forms are not measured: this machine is busy (load {load:.1f})")
        return found or Tuned()
    rows = sorted({*rows, *(found.rows if found else ())})
    note(
        f"measuring which forms are fast here for {precision.name}, once for this device and these "
        "sizes (--tuned off leaves it out)"
    )
    layers = layers or faster_layers(device.platform, rows=max(rows))
    tuned = tune(config, precision, rows, device, layers=layers)
    tuned = dataclasses.replace(tuned, training=found.training if found else ())
    store.keep(key, tuned)
    return tuned


def stored(asked: str, config: GLMConfig, precision: Precision, device: Any) -> Tuned:
    """Return what is known without measuring: kept, or in a file; `asked` is that of --tuned.

    Raises CheckpointError for a file of another device or model.
    """
    if asked == OFF:
        return Tuned()
    key = store.key_of(config, precision, device)
    return (store.find(key) or Tuned()) if asked == AUTO else store.read(Path(asked), key)


def _from_file(
    path: str, folder: Folder, choice: ModelChoice, precisions: Sequence[Precision], device: Any
) -> tuple[ModelChoice, Forms]:
    problem: CheckpointError | None = None
    for precision in precisions:
        try:
            tuned = stored(path, folder.config, precision, device)
            return _with_layers(dataclasses.replace(choice, dtype=precision.dtype), tuned)
        except CheckpointError as error:
            problem = problem or error
    assert problem is not None
    raise problem
