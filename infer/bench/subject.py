"""The model that a benchmark measures, in any form, and what it is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from convert.loading.folder import open_folder, target_scheme
from convert.random import official_config
from glm2_jax import GLMConfig
from glm2_jax.cli.messages import note
from glm2_jax.forms import Forms
from glm2_jax.mesh import mesh_text
from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype
from glm2_jax.runtime.machine import describe_device, describe_software
from glm2_jax.schemes import SCHEMES
from glm2_jax.sharding import check_mesh
from infer import startup
from infer.bench.host import describe_host, load_text
from infer.bench.options import Settings
from infer.engine.load import demo_folder, load
from infer.memory.precision import Precision
from infer.tuning.automatic import OFF, known
from infer.tuning.measure import Tuned
from infer.tuning.random_params import random_params


@dataclass(frozen=True)
class Variant:
    """A model in memory."""

    dtype: str
    quantization: str  # the scheme of the layers' matrices, or "none"
    layers: str  # "list" or "stacked"
    weights: int = 0  # bytes of all parameters, once
    forms: Forms = Forms()  # that were chosen by measuring
    kv: str = "auto"  # how the cache stores keys and values

    @property
    def precision(self) -> Precision:
        return Precision(self.dtype, None if self.quantization == "none" else self.quantization)

    @property
    def name(self) -> str:
        """ "bfloat16, int4 weights, int8 cache, layers list"."""
        weights = "" if self.quantization == "none" else f", {self.quantization} weights"
        cache = "" if self.kv == "auto" else f", {self.kv} cache"
        return f"{self.dtype}{weights}{cache}, layers {self.layers}"


class Subject:
    """The model of the flags, on one device or a mesh, of which `device` is one.

    Raises UsageError if it is quantized already, or the mesh does not fit it.
    """

    def __init__(self, settings: Settings, device: Any, mesh: Mesh | None = None):
        self.settings, self.device, self.mesh = settings, device, mesh
        choice, random = settings.choice, settings.random
        forms = settings.quantize or (None,)
        self._folder = None
        if random is not None:
            self.config = GLMConfig.from_hf(official_config(random, flag="--random"))
            self.name = f"{Path(random).name}, random weights"
            self._scheme = lambda quantize: SCHEMES.get(quantize or "none")
        else:
            startup.note_demo_model(choice)
            self._folder = startup.find_choice(choice).path
            self.name = "demo (bundled)" if self._folder is None else Path(self._folder).name
            found = open_folder(self._folder or demo_folder(), **choice.form)
            self.config, self._scheme = found.config, partial(target_scheme, found)
        for scheme in map(self._scheme, forms):  # also refuses what is quantized already
            if mesh is not None:
                check_mesh(self.config, mesh, scheme)

    def open(self, dtype: str, quantize: str | None, layers: str) -> tuple[Variant, Any]:
        """Return the parameters in a form, and what that form is called."""
        tuned = self._tuned(dtype, quantize, layers)
        place = {"device": self.device if self.mesh is None else None, "mesh": self.mesh}
        if self.settings.random is not None:
            quantization = quantize or "none"
            target = resolve_dtype(dtype, num_params=self.config.num_params, device=self.device)
            scheme, as_list = self._scheme(quantize), layers == "list"
            params = random_params(self.config, target, scheme=scheme, as_list=as_list, **place)
        else:
            form = {"dtype": dtype, "quantize": quantize, "layers": layers}
            form |= {"tuned": OFF, "compile_cache": "off"}  # seconds of compiling are a result
            checkpoint = load(self._folder, **form, **self.settings.choice.form, **place).checkpoint
            params, quantization = checkpoint.params, checkpoint.summary.quantization or "none"
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        name = dtype_name(params["final_norm"].dtype)
        kv = self.settings.kv
        return Variant(name, quantization, layers, weights, tuned.forms, kv), params

    def precision(self, dtype: str, quantize: str | None) -> Precision:
        """Return what flags of these values compute in, and how weights are stored."""
        target = resolve_dtype(dtype, num_params=self.config.num_params, device=self.device)
        scheme = self._scheme(quantize)
        return Precision(dtype_name(target), None if scheme is None else scheme.name)

    def _tuned(self, dtype: str, quantize: str | None, layers: str) -> Tuned:
        """Return the forms to compute in; they are measured now if they are not known yet."""
        if self.settings.tuned == OFF or self.mesh is not None:
            return Tuned()
        precision = self.precision(dtype, quantize)
        rows = sorted({1, *getattr(self.settings, "batches", ())})
        return known(self.config, precision, rows, self.device, layers, note)

    def about(self) -> dict[str, str]:
        """Return what everything is measured on, name -> text."""
        mesh = {} if self.mesh is None else {"mesh": describe_mesh(self.mesh, self.device.platform)}
        return {
            "model": self.name,
            "device": describe_device(self.device),
            **mesh,
            "host": describe_host(),
            "versions": describe_software(),
            "repetitions": f"{self.settings.repeat}, of {self.settings.steps} steps",
            "load average": f"{load_text()} at the start",
            "command": self.settings.command,
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
