"""Which form of a model fits into a machine's memory, and the command that answers with it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from glm2_jax.config import PRESETS, GLMConfig
from glm2_jax.runtime.machine import Device, Machine
from infer.memory.budget import GPU_SHARE, SHARE_VARIABLES
from infer.memory.plan import Plan
from infer.memory.precision import Precision, flags, precisions

PROMPT = "你好"
CONTEXT = 8192  # tokens that the cache is reckoned for: the default of --max-length


@dataclass(frozen=True)
class Model:
    """The model that is to fit.

    Attributes:
      folder: as the user named it; None = any 6B checkpoint.
      scheme: of `glm2_jax.schemes`, where the folder stores it quantized.
    """

    config: GLMConfig = PRESETS["chatglm2-6b"]
    folder: str | None = None
    scheme: str | None = None

    @property
    def name(self) -> str:
        return "a 6B model" if self.folder is None else self.folder


@dataclass(frozen=True)
class Place:
    """Where a model could compute.

    Attributes:
      platform: "cpu", "gpu", "tpu".
      memory: bytes that a program can have there; None = unknown.
      name: for people.
      flags: what the command needs to compute there.
      capable: of bfloat16.
    """

    platform: str
    memory: int | None
    name: str
    flags: str = ""
    capable: bool = True


@dataclass(frozen=True)
class Form:
    """A model with its weights in one precision at one place; bytes.

    Attributes:
      flags: that ask for it.
      needs: everything, a context of `CONTEXT` tokens included.
      fits: None where the place does not tell its memory.
    """

    precision: Precision
    place: Place
    flags: str
    weights: int
    cache: int
    needs: int
    fits: bool | None


def forms(model: Model, place: Place) -> list[Form]:
    """Every form that can be computed with at a place, the preferred first.

    Wider weights are preferred, since they are the model as it was trained; but float32 on a
    device with fast 16-bit numbers. A folder that is stored quantized is best left as it is.
    """
    choices = list(precisions("bfloat16" if place.capable else "float16", model.scheme))
    if place.platform != "cpu":
        choices.append(choices.pop(0))  # float32
    if model.scheme is not None:
        choices.sort(key=lambda choice: choice.quantize is None)
    return [_form(model, place, choice) for choice in choices]


def _form(model: Model, place: Place, precision: Precision) -> Form:
    tokens = min(CONTEXT, model.config.seq_length)
    plan = Plan(model.config, precision, tokens, platform=place.platform)
    fits = None if place.memory is None else plan.total <= place.memory
    shown = flags(precision, model.scheme)
    return Form(precision, place, shown, plan.weights, plan.cache, plan.total, fits)


def places(machine: Machine) -> list[Place]:
    """Where this machine can compute, the fastest first: nowhere, if jax does not work."""
    found = []
    device = machine.jax.devices[0] if machine.jax.devices else None
    if device is not None and device.platform != "cpu":
        found.append(_device_place(machine, device))
    works = machine.jax.works or (machine.jax_on_cpu is not None and machine.jax_on_cpu.works)
    if works:
        only = device is not None and device.platform == "cpu"
        flags = "" if only else "--device cpu"
        found.append(Place("cpu", machine.memory.usable, "processor", flags=flags))
    return found


def _device_place(machine: Machine, device: Device) -> Place:
    """The device with what our commands make jax take of its memory."""
    capable = device.platform != "gpu" or not _older_than_8(device.capability)
    memory, gpus = device.memory, machine.nvidia.gpus
    if device.platform == "gpu" and len(gpus) == 1 and gpus[0].total:
        chosen = any(name in machine.variables for name in SHARE_VARIABLES)
        usable = memory if chosen and memory else int(gpus[0].total * GPU_SHARE)
        memory = min(usable, gpus[0].free)
    return Place(device.platform, memory, device.kind, capable=capable)


def _older_than_8(capability: str) -> bool:
    try:
        return float(capability) < 8.0
    except ValueError:
        return False


def best_form(model: Model, machine: Machine) -> Form | None:
    """The form to take: the first that fits, the fastest place first; None where none does."""
    for place in places(machine):
        found = next((form for form in forms(model, place) if form.fits), None)
        if found is not None:
            return found
    return None


def command(model: Model, form: Form) -> str:
    """The command that answers with a form."""
    folder = "FOLDER" if model.folder is None else shlex.quote(model.folder)
    parts = (
        f"python -m infer.generate --model {folder} {form.flags}",
        form.place.flags,
        f"--prompt {PROMPT}",
    )
    return " ".join(part for part in parts if part)


def demo_command(machine: Machine) -> str:
    """The command that answers with the bundled demo model."""
    flags = "" if machine.jax.works else " --device cpu"
    return f"python -m infer.generate{flags} --prompt {PROMPT}"
