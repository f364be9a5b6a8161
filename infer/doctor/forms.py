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


def forms(model: Model, machine: Machine) -> tuple[tuple[Budget, Plan], ...]:
    """Return every form of a model where this machine can compute, the preferred first: none, if
    jax does not work.

    The fastest device comes first. Wider weights are preferred, since they are the model as it was
    trained; but float32 comes last on a device with fast 16-bit numbers. A quantized folder is best
    left as it is.
    """
    found = []
    if machine.jax.devices and machine.jax.devices[0].platform != "cpu":
        budget = _accelerator(machine, machine.jax.devices[0])
        widest, *narrower = precisions(budget.half, model.scheme)
        found += [(budget, precision) for precision in (*narrower, widest)]
    if machine.jax.works or (machine.jax_on_cpu is not None and machine.jax_on_cpu.works):
        budget = Budget("processor", "cpu", machine.memory.usable)
        found += [(budget, precision) for precision in precisions(budget.half, model.scheme)]
    if model.scheme is not None:
        found.sort(key=lambda form: (form[0].platform == "cpu", form[1].quantize is None))
    return tuple(
        (budget, Plan(model.config, precision, model.context, platform=budget.platform))
        for budget, precision in found
    )


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
