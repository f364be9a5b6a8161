"""The model that a benchmark measures, in any form, and what it is measured on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from convert.loading.folder import open_folder, target_scheme
from convert.random import official_config
from glm2_jax import GLMConfig
from glm2_jax.cli.messages import human_size
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.mesh import mesh_text
from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype
from glm2_jax.runtime.host_memory import find_memory
from glm2_jax.runtime.machine import describe_device, describe_software, processor
from glm2_jax.schemes import SCHEMES
from glm2_jax.sharding import check_mesh
from infer import startup
from infer.bench.measure import Variant
from infer.bench.random_params import random_params
from infer.engine.load import demo_folder, load


class Subject:
    """The model that is measured, in any form.

    Attributes:
        device: where it is; on a mesh one of its devices, which stands for all.
        mesh: over which it is spread; None = one device.
        config: None until a folder has been opened.
        name: for people.
    """

    def __init__(
        self,
        choice: ModelChoice,
        device: Any,
        mesh: Mesh | None = None,
        *,
        random: str | None = None,
        layers: int | None = None,
    ):
        self.device, self.mesh = device, mesh
        self.config: GLMConfig | None = None
        self._form, self._random, self._folder = choice.form, random is not None, None
        if random is not None:
            self.config = GLMConfig.from_hf(official_config(random, layers=layers, flag="--random"))
            self.name = f"{Path(random).name}, random weights"
        else:
            startup.note_demo_model(choice)
            self._folder = startup.find_choice(choice).path
            self.name = "demo (bundled)" if self._folder is None else Path(self._folder).name

    def check_forms(self, forms: Sequence[str | None]) -> None:
        """Check, before anything is measured, that the model can be had in these forms.

        Raises:
            UsageError: it is quantized already, or the mesh does not fit it. CheckpointError: it
                cannot be opened.
        """
        if self.config is not None:
            config = self.config
            schemes = [SCHEMES.get(quantize or "none") for quantize in forms]
        else:
            found = open_folder(self._folder or demo_folder(), **self._form)
            config = found.config
            schemes = [target_scheme(found, quantize) for quantize in forms]
        if self.mesh is not None:
            for scheme in schemes:
                check_mesh(config, self.mesh, scheme)

    def open(self, dtype: str, quantize: str | None, layers: str) -> tuple[Variant, Any]:
        """Return the parameters in a form, and what that form is called."""
        place: dict[str, Any] = {"device": self.device} if self.mesh is None else {}
        place["mesh"] = self.mesh
        if self._random:
            assert self.config is not None
            quantization = quantize or "none"
            target = resolve_dtype(dtype, num_params=self.config.num_params, device=self.device)
            scheme, as_list = SCHEMES.get(quantization), layers == "list"
            params = random_params(self.config, target, scheme=scheme, as_list=as_list, **place)
        else:
            form = {"dtype": dtype, "quantize": quantize, "layers": layers, **self._form}
            checkpoint = load(self._folder, **form, **place).checkpoint
            self.config, params = checkpoint.config, checkpoint.params
            quantization = checkpoint.summary.quantization or "none"
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        name = dtype_name(params["final_norm"].dtype)
        return Variant(name, quantization, layers, weights), params

    def about(self, command: str, repetitions: str) -> dict[str, str]:
        """Return what everything is measured on, name -> text."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        memory = find_memory().total
        mesh = {} if self.mesh is None else {"mesh": describe_mesh(self.mesh, self.device.platform)}
        return {
            "model": self.name,
            "device": describe_device(self.device),
            **mesh,
            "host": f"{processor()}, {cores} cores" + (f", {human_size(memory)}" if memory else ""),
            "versions": describe_software(),
            "repetitions": repetitions,
            "load average": f"{load_average()} at the start",
            "command": command,
        }


def describe_mesh(mesh: Mesh, platform: str) -> str:
    """Return the axes of a mesh and its devices, for people."""
    devices = "1 device" if mesh.size == 1 else f"{mesh.size} devices"
    if platform == "cpu" and mesh.size > 1:
        devices = (
            f"{mesh.size} virtual devices of one CPU, which share its memory and cores: "
            "its measured limits are not multiplied"
        )
    return f"{mesh_text(mesh.shape)}, {devices}"


def load_average() -> str:
    """Return the load of this machine in the last minute."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
