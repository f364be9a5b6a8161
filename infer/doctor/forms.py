"""The dtype and quantization that fit into a machine's memory, and the command to run them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from glm2_jax.cli.commands import as_typed
from glm2_jax.config import PRESETS, GLMConfig
from glm2_jax.runtime.machine import Device, Machine
from infer.memory.budget import DEFAULT_CONTEXT, GPU_SHARE, SHARE_VARIABLES, Budget
from infer.memory.plan import Plan
from infer.memory.precision import flags, precisions

PROMPT = "你好"


@dataclass(frozen=True)
class Model:
    """The model that is to fit."""

    config: GLMConfig = PRESETS["chatglm2-6b"]
    folder: str | None = None  # as the user named it; None = any 6B checkpoint
    scheme: str | None = None  # of `glm2_jax.schemes`, where the folder is quantized

    @property
    def name(self) -> str:
        return "a 6B model" if self.folder is None else self.folder

    @property
    def context(self) -> int:
        """Tokens that must fit."""
        return min(DEFAULT_CONTEXT, self.config.seq_length)


@dataclass(frozen=True)
class Place:
    """Where a model could compute, and its forms there, the preferred first."""

    budget: Budget
    forms: tuple[Plan, ...]

    @property
    def best(self) -> Plan | None:
        """The first form that fits."""
        return next((form for form in self.forms if self.budget.fits(form)), None)


def places(model: Model, machine: Machine) -> tuple[Place, ...]:
    """Return where this machine can compute, the fastest first: nowhere, if jax does not work."""
    budgets = []
    if machine.jax.devices and machine.jax.devices[0].platform != "cpu":
        budgets.append(_accelerator(machine, machine.jax.devices[0]))
    if machine.jax.works or (machine.jax_on_cpu is not None and machine.jax_on_cpu.works):
        budgets.append(Budget("processor", "cpu", machine.memory.usable))
    return tuple(Place(budget, _forms(model, budget)) for budget in budgets)


def _accelerator(machine: Machine, device: Device) -> Budget:
    """Return the device with what our commands have jax take of its memory."""
    memory, gpus = device.memory, machine.nvidia.gpus
    if device.platform == "gpu" and len(gpus) == 1 and gpus[0].total:
        chosen = any(name in machine.variables for name in SHARE_VARIABLES)
        usable = memory if chosen and memory else int(gpus[0].total * GPU_SHARE)
        memory = min(usable, gpus[0].free)
    older = device.platform == "gpu" and re.match(r"[0-7]\.", device.capability)
    half = "float16" if older else "bfloat16"
    return Budget(device.kind, device.platform, memory, half=half)


def _forms(model: Model, budget: Budget) -> tuple[Plan, ...]:
    """Return every form of a model at a place.

    Wider weights are preferred, since they are the model as it was trained; but float32 comes last
    on a device with fast 16-bit numbers. A quantized folder is best left as it is.
    """
    choices = list(precisions(budget.half, model.scheme))
    if budget.platform != "cpu":
        choices.append(choices.pop(0))  # float32
    if model.scheme is not None:
        choices.sort(key=lambda choice: choice.quantize is None)
    return tuple(
        Plan(model.config, choice, model.context, platform=budget.platform) for choice in choices
    )


def command(model: Model, machine: Machine, form: Plan | None) -> str:
    """Return the command that answers with a form; None = with the bundled demo model."""
    parts = ["python -m infer.generate"]
    uses_cpu = [device.platform for device in machine.jax.devices[:1]] == ["cpu"]
    if form is not None:
        folder = "FOLDER" if model.folder is None else shlex.quote(model.folder)
        parts += [f"--model {folder}", flags(form.precision, model.scheme)]
        parts += ["--device cpu"] if form.platform == "cpu" and not uses_cpu else []
    elif not machine.jax.works:
        parts.append("--device cpu")
    return as_typed(" ".join([*parts, f"--prompt {PROMPT}"]))
