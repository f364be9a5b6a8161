"""What is trained: an adapter of a frozen base, or all parameters."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import Checkpoint, load_checkpoint
from convert.adapters.adapter import Adapter, open_adapter, save_adapter
from convert.adapters.tensors import layouts_of
from convert.loading.folder import Folder
from convert.writing.own import save_checkpoint
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.errors import UsageError
from glm2_jax.lora import LoRA, find_targets, init_lora
from glm2_jax.processes import join
from glm2_jax.runtime.dtypes import resolve_dtype
from glm2_jax.runtime.gather import gathered
from glm2_jax.sharding import lora_sharding
from train.devices import Devices, layers_to_train
from train.recipe import AdapterOptions, Recipe
from train.run_folder.folder import MODEL

Progress = Callable[[int, int], None]
Load = Callable[[Folder, ModelChoice, Devices, Progress], Checkpoint]


class Method(ABC):
    """What a run trains."""

    checkpoint: Checkpoint  # the model that it starts from
    base: Any  # frozen parameters; None = none
    trained: Any  # the trained arrays before the first step, float32
    dtype: np.dtype | None  # that all parameters are computed in; None = their own
    computed: np.dtype  # dtype of the activations
    # makes the adapter from the trained arrays; None = they are the adapter
    effective: Callable[[LoRA], LoRA] | None = None

    @property
    def num_trained(self) -> int:
        """The number of trained parameters."""
        return sum(x.size for x in jax.tree.leaves(self.trained))

    @abstractmethod
    def model(self, trained: Any) -> tuple[Any, LoRA | None]:
        """Return the parameters and the adapter that answer with the trained arrays."""

    @abstractmethod
    def write(self, folder: Path, trained: Any) -> Path:
        """Write the result and return its folder. All processes must call this; the first one
        writes."""


class AdapterMethod(Method):
    """Trains an adapter of a frozen base, which may be quantized; `load` may share it between runs.

    Raises UsageError for flags that contradict the adapter, CheckpointError where the base or the
    first adapter cannot be opened, or they do not fit.
    """

    def __init__(
        self, folder: Folder, recipe: Recipe, devices: Devices, progress: Progress,
        load: Load | None = None,
    ):  # fmt: skip
        adapter = first_adapter(folder, recipe)
        remat = recipe.training.grad_checkpoint
        layers = layers_to_train(
            devices.first.platform, on_mesh=devices.mesh is not None, remat=bool(remat)
        )
        choice = dataclasses.replace(recipe.choice, layers=layers)
        checkpoint = (load or load_base)(folder, choice, devices, progress)
        self.base, self.dtype = checkpoint.params, None
        self.computed = self.base["embed"].dtype
        places = None if devices.mesh is None else lora_sharding(adapter.lora, devices.mesh)
        self.trained = devices.put(adapter.lora, places)
        self._adapter = dataclasses.replace(
            adapter, base=checkpoint.fingerprint, template=checkpoint.template
        )
        if adapter.shape is not None and not adapter.shape.is_plain:
            self.effective = jax.jit(adapter.shape.effective)
        notes = (*checkpoint.notes, *adapter.notes)
        self.checkpoint = dataclasses.replace(checkpoint, notes=notes)

    @property
    def num_trained(self) -> int:
        shape = self._adapter.shape
        return super().num_trained if shape is None else shape.num_params(self.trained)

    def model(self, trained: Any) -> tuple[Any, LoRA | None]:
        return self.base, trained if self.effective is None else self.effective(trained)

    def write(self, folder: Path, trained: Any) -> Path:
        lora = jax.tree.map(gathered, trained)
        if join.is_first():
            save_adapter(folder, dataclasses.replace(self._adapter, lora=lora))
        return folder


class FullMethod(Method):
    """Trains all parameters, stored in float32 and computed in `--dtype`; else as above."""

    def __init__(self, folder: Folder, recipe: Recipe, devices: Devices, progress: Progress):
        choice = dataclasses.replace(recipe.choice, dtype="float32", quantize="none")
        self.checkpoint = load_base(folder, choice, devices, progress)
        self.base, self.trained = None, self.checkpoint.params
        self.dtype = self.computed = resolve_dtype(
            recipe.choice.dtype, num_params=folder.config.num_params, device=devices.first
        )

    def model(self, trained: Any) -> tuple[Any, LoRA | None]:
        return jax.tree.map(lambda x: x.astype(self.computed), trained), None

    def write(self, folder: Path, trained: Any) -> Path:
        checkpoint, result = self.checkpoint, folder / MODEL
        source = f"trained from {checkpoint.summary.source}"
        save_checkpoint(
            result, checkpoint.config, trained, checkpoint.tokenizer, source=source,
            template=checkpoint.template, overwrite=True,
        )  # fmt: skip
        return result


def load_base(
    folder: Folder, choice: ModelChoice, devices: Devices, progress: Progress
) -> Checkpoint:
    """Load the model to start from."""
    return load_checkpoint(
        folder.path,
        dtype=choice.dtype,
        quantize=choice.quantize,
        layers=choice.layers or "stacked",
        mesh=devices.mesh,
        device=devices.first if devices.mesh is None else None,
        progress=progress,
        **choice.form,
    )


def first_adapter(folder: Folder, recipe: Recipe) -> Adapter:
    """Return a new adapter, or the one to start from."""
    options = recipe.adapter
    assert options is not None
    if options.init_adapter is None:
        new: dict[str, Any] = {
            "rank": options.rank, "alpha": options.alpha, "targets": options.target,
            "dropout": options.dropout, "rslora": options.rslora,
        }  # fmt: skip
        lora = init_lora(folder.config, jax.random.key(recipe.training.seed), **new)
        official = layouts_of(folder.config)[0].name
        return Adapter(lora=lora, rslora=bool(options.rslora), official=official)
    form = {"family": recipe.choice.family, "force": options.force_adapter, "apart": True}
    found = open_adapter(options.init_adapter, folder, **form)
    _refuse_contradictions(found, options, folder.config.num_layers)
    return dataclasses.replace(found, lora=dataclasses.replace(found.lora, dropout=options.dropout))


def _refuse_contradictions(found: Adapter, options: AdapterOptions, num_layers: int) -> None:
    """Raise UsageError with all flags for a new adapter that contradict the one to start from."""
    shape = found.shape
    assert shape is not None
    ranks, alphas = (sorted(set(values)) for values in zip(*shape.choices.values(), strict=True))
    wrong = []
    if options.rank is not None and ranks != [options.rank]:
        wrong.append(f"--rank {options.rank} (it has {', '.join(map(str, ranks))})")
    if options.alpha is not None and alphas != [options.alpha]:
        wrong.append(f"--alpha {options.alpha:g} (it has {', '.join(f'{x:g}' for x in alphas)})")
    if options.target is not None:
        targets = find_targets(options.target)
        places = shape.layout.places(num_layers).values()
        if {place for place in places if place[0].target in targets} != shape.choices.keys():
            names = ", ".join(dict.fromkeys(module.name for module, _ in shape.choices))
            layers = len({layer for _, layer in shape.choices})
            wrong.append(f"--target {options.target} (it has {names} in {layers} layers)")
    if options.rslora and not found.rslora:
        wrong.append("--rslora (it has none)")
    if wrong:
        raise UsageError(
            f"{options.init_adapter} contradicts {'; '.join(wrong)}.",
            "An adapter keeps its rank, alpha, matrices and rsLoRA when it is trained further.",
            "Leave these flags out, or leave out --init-adapter to train a new adapter.",
        )
