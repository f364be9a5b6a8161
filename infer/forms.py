"""Which form of a model fits into a machine's memory, and the command that answers with it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from glm2_jax.config import PRESETS, GLMConfig
from infer.machine import Device, Machine

PROMPT = "你好"
DEFAULT_SHARE = 0.75  # of a GPU's memory: what jax takes unless it is told otherwise
LARGEST_SHARE = 0.95
CONTEXT = 8192  # tokens that the cache is reckoned for: the default of --max-length
HEAD_ROOM = 1.5e9  # programs, logits, the runtime itself
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Model:
    """The model that is to fit.

    Attributes:
      folder: as the user named it; None = any 6B checkpoint.
      bits: 4 or 8 where the folder stores it quantised, else 0.
    """

    config: GLMConfig = PRESETS["chatglm2-6b"]
    folder: str | None = None
    bits: int = 0

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
      variables, flags: what the command needs to compute there.
      capable: of bfloat16.
    """

    platform: str
    memory: int | None
    name: str
    variables: str = ""
    flags: str = ""
    capable: bool = True


@dataclass(frozen=True)
class Form:
    """A model in one type at one place; bytes.

    Attributes:
      fits: None where the place does not tell its memory.
    """

    dtype: str
    place: Place
    weights: int
    cache: int
    needs: int
    fits: bool | None


def forms(model: Model, place: Place) -> list[Form]:
    """Every form that can be computed with at a place, the preferred first.

    Folders stored in int4 or int8 are dequantised while they are loaded, so they take the memory
    of these forms, too.
    """
    half = "bfloat16" if place.capable else "float16"
    preferred = ("float32", half) if place.platform == "cpu" else (half, "float32")
    return [_form(model, place, dtype) for dtype in preferred]


def _form(model: Model, place: Place, dtype: str) -> Form:
    config, size = model.config, _BYTES[dtype]
    tokens = min(CONTEXT, config.seq_length)
    weights = config.num_params * size
    cache = tokens * config.num_layers * 2 * config.num_kv_heads * config.head_dim * size
    needs = int(weights + cache + HEAD_ROOM)
    fits = None if place.memory is None else needs <= place.memory
    return Form(dtype, place, weights, cache, needs, fits)


def places(machine: Machine) -> list[Place]:
    """Where this machine can compute, the fastest first: nowhere, if jax does not work."""
    found = []
    device = machine.jax.devices[0] if machine.jax.devices else None
    if device is not None and device.platform != "cpu":
        found += _device_places(machine, device)
    works = machine.jax.works or (machine.jax_on_cpu is not None and machine.jax_on_cpu.works)
    if works:
        only = device is not None and device.platform == "cpu"
        flags = "" if only else "--device cpu"
        found.append(Place("cpu", machine.memory.usable, "processor", flags=flags))
    return found


def _device_places(machine: Machine, device: Device) -> list[Place]:
    """The device as jax is set up, and with a larger share of its memory where that helps."""
    capable = device.platform != "gpu" or not _older_than_8(device.capability)
    memory, more = device.memory, None
    gpus = machine.nvidia.gpus
    if device.platform == "gpu" and len(gpus) == 1 and gpus[0].total:
        free = gpus[0].free
        memory = min(memory or int(gpus[0].total * DEFAULT_SHARE), free)
        more = min(int(gpus[0].total * LARGEST_SHARE), free)
    usual = Place(device.platform, memory, device.kind, capable=capable)
    if memory is None or more is None or more <= memory:
        return [usual]
    variables = f"XLA_PYTHON_CLIENT_MEM_FRACTION={LARGEST_SHARE:g}"
    return [usual, Place("gpu", more, device.kind, variables, capable=capable)]


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
        form.place.variables,
        f"python -m infer.generate --model {folder} --dtype {form.dtype}",
        form.place.flags,
        f"--prompt {PROMPT}",
    )
    return " ".join(part for part in parts if part)


def demo_command(machine: Machine) -> str:
    """The command that answers with the bundled demo model."""
    flags = "" if machine.jax.works else " --device cpu"
    return f"python -m infer.generate{flags} --prompt {PROMPT}"
