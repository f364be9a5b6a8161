"""What is trained: an adapter or a prefix of a frozen base, or all parameters."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import Checkpoint, load_checkpoint
from convert.adapters.adapter import Adapter, open_adapter, save_adapter
from convert.adapters.layouts import layouts_of
from convert.adapters.prefix import encode, init_encoder, save_prefix
from convert.loading.folder import Folder
from convert.writing.own import save_checkpoint
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.dora import norms, with_magnitudes, with_own_gains
from glm2_jax.errors import UsageError
from glm2_jax.lora import LoRA, check_dropout, find_targets, init_lora
from glm2_jax.prefix import Prefix
from glm2_jax.processes import join
from glm2_jax.runtime.devices import layers_to_train
from glm2_jax.runtime.dtypes import resolve_dtype
from glm2_jax.runtime.gather import gathered
from glm2_jax.sharding import lora_sharding, replicated
from train.devices import Devices
from train.options import AdapterOptions, PrefixOptions
from train.recipe import Recipe
from train.run_folder.folder import MODEL
from train.step import combine

Progress = Callable[[int, int], None]
Load = Callable[[Folder, ModelChoice, Devices, Progress], Checkpoint]


class Method(ABC):
    """What a run trains."""

    checkpoint: Checkpoint  # the model that it starts from
    base: Any  # frozen parameters; None = none
    trained: Any  # the trained arrays before the first step, float32
    dtype: np.dtype | None  # that all parameters are computed in; None = their own
    computed: np.dtype  # dtype of the activations
    # makes the adapter or the prefix from the trained arrays; None = they are the adapter
    effective: Callable[[Any], LoRA | Prefix] | None = None

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


class FrozenMethod(Method):
    """Trains something on a frozen base, which may be quantized."""

    def _freeze(self, checkpoint: Checkpoint) -> None:
        self.base, self.dtype = checkpoint.params, None
        self.computed = self.base["final_norm"].dtype

    def model(self, trained: Any) -> tuple[Any, LoRA | None]:
        adapter = trained if self.effective is None else self.effective(trained)
        if isinstance(adapter, LoRA):
            adapter = with_own_gains(self.base, adapter)
        return combine(self.base, adapter)


class AdapterMethod(FrozenMethod):
    """Trains an adapter; `load` may share the base between runs.

    Raises UsageError for flags that contradict the adapter, CheckpointError where the base or the
    first adapter cannot be opened, or they do not fit.
    """

    def __init__(
        self, folder: Folder, recipe: Recipe, devices: Devices, progress: Progress,
        load: Load | None = None,
    ):  # fmt: skip
        assert isinstance(recipe.adapter, AdapterOptions)
        adapter = first_adapter(folder, recipe, recipe.adapter)
        checkpoint = _load_frozen(folder, recipe, devices, progress, load or load_base)
        self._freeze(checkpoint)
        self.trained = _placed(adapter.lora, devices)
        if recipe.adapter.dora and not adapter.dora:
            with devices.active():
                rows = jax.jit(norms)(self.base, self.trained)
            rows = jax.tree.map(gathered, rows)
            self.trained = _placed(with_magnitudes(adapter.lora, rows), devices)
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

    def write(self, folder: Path, trained: Any) -> Path:
        lora = jax.tree.map(gathered, trained)
        if join.is_first():
            save_adapter(folder, dataclasses.replace(self._adapter, lora=lora))
        return folder


class PrefixMethod(FrozenMethod):
    """Trains a P-Tuning v2 prefix.

    Raises UsageError for a prefix that is longer than the context, or a dropout rate that is none.
    """

    def __init__(self, folder: Folder, recipe: Recipe, devices: Devices, progress: Progress):
        options, config = recipe.adapter, folder.config
        assert isinstance(options, PrefixOptions)
        if options.pre_seq_len > config.seq_length:
            raise UsageError(
                f"--pre-seq-len must be at most {config.seq_length}, got {options.pre_seq_len}.",
                "That is the context of the model.",
            )
        check_dropout(options.dropout)
        key = jax.random.key(recipe.training.seed)
        new = init_encoder(config, key, options.pre_seq_len, projection=options.prefix_projection)
        checkpoint = _load_frozen(folder, recipe, devices, progress, load_base)
        self._freeze(checkpoint)
        mesh = devices.mesh
        places = None if mesh is None else jax.tree.map(lambda _: replicated(mesh), new)
        self.trained = devices.put(new, places)
        self.effective = jax.jit(partial(encode, config, dropout=options.dropout))
        params, _ = self.model(self.trained)
        self.checkpoint = dataclasses.replace(checkpoint, params=params)

    def write(self, folder: Path, trained: Any) -> Path:
        encoder = jax.tree.map(gathered, trained)
        if join.is_first():
            save_prefix(folder, self.checkpoint.config, encoder)
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


def _placed(lora: LoRA, devices: Devices) -> LoRA:
    places = None if devices.mesh is None else lora_sharding(lora, devices.mesh)
    return devices.put(lora, places)


def _load_frozen(
    folder: Folder, recipe: Recipe, devices: Devices, progress: Progress, load: Load
) -> Checkpoint:
    """Load a base that is not trained, its layers in the form that trains faster."""
    remat = recipe.training.grad_checkpoint or "none"
    on_mesh = devices.mesh is not None
    layers = layers_to_train(devices.first.platform, remat, on_mesh=on_mesh)
    return load(folder, dataclasses.replace(recipe.choice, layers=layers), devices, progress)


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


def first_adapter(folder: Folder, recipe: Recipe, options: AdapterOptions) -> Adapter:
    """Return a new adapter, or the one to start from."""
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
    if options.dora and not found.dora:
        wrong.append("--dora (it has none)")
    if wrong:
        raise UsageError(
            f"{options.init_adapter} contradicts {'; '.join(wrong)}.",
            "An adapter keeps its rank, alpha, matrices, rsLoRA and DoRA when it is trained "
            "further.",
            "Leave these flags out, or leave out --init-adapter to train a new adapter.",
        )
