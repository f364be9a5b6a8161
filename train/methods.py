"""What is trained: an adapter beside a base that stays, or all parameters."""

from __future__ import annotations

import argparse
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import Checkpoint, load_checkpoint
from convert.adapters.adapter import Adapter, save_adapter
from convert.adapters.attach import open_adapter
from convert.loading.folder import Folder
from convert.writing.own import save_checkpoint
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import UsageError
from glm2_jax.lora import LoRA, find_targets, init_lora, with_lora
from glm2_jax.processes import join
from glm2_jax.runtime.devices import faster_layers
from glm2_jax.runtime.dtypes import resolve_dtype
from glm2_jax.runtime.gather import gathered
from glm2_jax.sharding import lora_sharding
from infer.engine.engine import Engine
from train.devices import Devices
from train.run_folder.folder import MODEL

Progress = Callable[[int, int], None]


class Method(ABC):
    """What a run trains.

    Attributes:
        checkpoint: the model that it starts from.
        base: parameters that stay; None = none.
        trained: what the first step starts from, float32.
        dtype: that all parameters are computed in; None = their own.
        computed: dtype of the activations.
        effective: makes the adapter of what is trained; None = it is what answers.
    """

    checkpoint: Checkpoint
    base: Any
    trained: Any
    dtype: np.dtype | None
    computed: np.dtype
    effective: Callable[[LoRA], LoRA] | None = None

    @property
    def num_trained(self) -> int:
        """How many parameters are trained."""
        return sum(x.size for x in jax.tree.leaves(self.trained))

    @abstractmethod
    def model(self, trained: Any) -> tuple[Any, LoRA | None]:
        """(parameters, adapter) that answer with what is trained."""

    @abstractmethod
    def write(self, folder: Path, trained: Any) -> Path:
        """Writes the result; returns the folder that inference takes. Of several processes all
        call it, and the first one writes."""

    def answering(self) -> Callable[[Any], Engine]:
        """A function of what is trained: the engine that answers with it, always the same one."""
        engine = Engine(self.checkpoint)

        def engine_of(trained: Any) -> Engine:
            params, lora = self.model(trained)
            params = params if lora is None else with_lora(params, lora)
            engine.checkpoint = dataclasses.replace(self.checkpoint, params=params)
            return engine

        return engine_of


class AdapterMethod(Method):
    """Trains an adapter beside a base, which may be quantized.

    Args:
        folder: the base.
        args: the flags of `train.lora`.
        devices: where to compute.
        progress: called with the bytes of parameters loaded and to load.

    Raises:
        UsageError: flags that make no sense. CheckpointError: the base or the first adapter cannot
            be opened, or they do not belong together.
    """

    def __init__(
        self, folder: Folder, args: argparse.Namespace, devices: Devices, progress: Progress
    ):
        adapter = _first_adapter(folder, args)
        self.checkpoint = load_checkpoint(
            folder.path,
            dtype=args.dtype,
            quantize=args.quantize_base,
            layers=faster_layers(devices.first.platform, on_mesh=devices.mesh is not None),
            mesh=devices.mesh,
            **from_flags(ModelChoice, args).form,
            device=devices.first if devices.mesh is None else None,
            progress=progress,
        )
        self.base, self.dtype = self.checkpoint.params, None
        self.computed = self.base["embed"].dtype
        places = None if devices.mesh is None else lora_sharding(adapter.lora, devices.mesh)
        self.trained = devices.put(adapter.lora, places)
        self._adapter = dataclasses.replace(
            adapter, base=self.checkpoint.fingerprint, template=self.checkpoint.template
        )
        if adapter.shape is not None and not adapter.shape.is_plain:
            self.effective = jax.jit(adapter.shape.effective)
        self.checkpoint = dataclasses.replace(
            self.checkpoint, notes=(*self.checkpoint.notes, *adapter.notes)
        )

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


def _first_adapter(folder: Folder, args: argparse.Namespace) -> Adapter:
    if args.init_adapter is not None:
        found = open_adapter(
            args.init_adapter,
            folder.path,
            **from_flags(ModelChoice, args).form,
            force=args.force_adapter,
            apart=True,
        )
        _refuse_contradictions(found, args, folder.config.num_layers)
        return dataclasses.replace(
            found, lora=dataclasses.replace(found.lora, dropout=args.dropout)
        )
    lora = init_lora(
        folder.config,
        jax.random.key(args.seed),
        rank=args.rank,
        alpha=args.alpha,
        targets=args.target,
        dropout=args.dropout,
        rslora=args.rslora,
    )
    return Adapter(lora=lora, rslora=args.rslora)


def _refuse_contradictions(found: Adapter, args: argparse.Namespace, num_layers: int) -> None:
    """Refuses flags for a new adapter that are not those of the one to start from.

    Raises:
        UsageError: names all of them.
    """
    shape = found.shape
    assert shape is not None
    ranks, alphas = (sorted(set(values)) for values in zip(*shape.choices.values(), strict=True))
    adapted = list(dict.fromkeys(module.name for module, _ in shape.choices))
    wrong = []
    if args.rank is not None and ranks != [args.rank]:
        wrong.append(f"--rank {args.rank} (it has {', '.join(map(str, ranks))})")
    if args.alpha is not None and alphas != [args.alpha]:
        wrong.append(f"--alpha {args.alpha:g} (it has {', '.join(f'{x:g}' for x in alphas)})")
    if args.target is not None:
        targets = find_targets(args.target)
        wanted = {
            place
            for place in shape.layout.places(num_layers).values()
            if place[0].target in targets
        }
        if wanted != shape.choices.keys():
            places = f"{', '.join(adapted)} in {len({x for _, x in shape.choices})} layers"
            wrong.append(f"--target {args.target} (it has {places})")
    if args.rslora and not found.rslora:
        wrong.append("--rslora (it has none)")
    if wrong:
        raise UsageError(
            f"{args.init_adapter} contradicts {'; '.join(wrong)}.",
            "An adapter keeps its rank, alpha, matrices and rsLoRA where it is trained further.",
            "Leave these flags out, or leave out --init-adapter to train a new adapter.",
        )


class FullMethod(Method):
    """Trains all parameters, which are float32, and computes in `--dtype`; else as above."""

    def __init__(
        self, folder: Folder, args: argparse.Namespace, devices: Devices, progress: Progress
    ):
        config = folder.config
        self.checkpoint = load_checkpoint(
            folder.path,
            dtype="float32",
            quantize="none",
            mesh=devices.mesh,
            **from_flags(ModelChoice, args).form,
            device=devices.first if devices.mesh is None else None,
            progress=progress,
        )
        self.base, self.trained = None, self.checkpoint.params
        self.computed = resolve_dtype(
            args.dtype, num_params=config.num_params, device=devices.first
        )
        self.dtype = self.computed

    def model(self, trained: Any) -> tuple[Any, LoRA | None]:
        return jax.tree.map(lambda x: x.astype(self.computed), trained), None

    def write(self, folder: Path, trained: Any) -> Path:
        result = folder / MODEL
        save_checkpoint(
            result,
            self.checkpoint.config,
            trained,
            self.checkpoint.tokenizer,
            source=f"trained from {self.checkpoint.summary.source}",
            template=self.checkpoint.template,
            overwrite=True,
        )
        return result
