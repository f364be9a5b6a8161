"""The memory that a model may take on this machine, and what to do where that is too little.

Nothing here starts jax, so that what is decided (the share of a GPU's memory, the platform) still
counts when it starts.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.config import GLMConfig
from glm2_jax.errors import DeviceError, GLMError, UsageError
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.runtime.host_memory import find_memory
from glm2_jax.runtime.machine import Gpu, count_tpus, find_nvidia
from glm2_jax.schemes import asked_scheme
from infer.memory.cards import CARDS, find_card
from infer.memory.plan import RUNTIME, Plan, nearest
from infer.memory.precision import Precision, flags, precisions
from infer.memory.shares import count_devices, sizes_of

DEFAULT_CONTEXT = 8192  # the default of --max-length
# Share of a GPU's memory; the driver and the desktop use the rest.
GPU_SHARE = 0.95
SHARE_VARIABLES = (  # the user's limits of jax's share of a GPU's memory
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_CLIENT_MEM_FRACTION",
)
SPARE = 1.1  # factor on a plan, for fragmentation of the pool
_LONG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Budget:
    """Where a model is to compute, and what it may take there."""

    name: str  # the device's name, for people
    platform: str  # "cpu", "gpu" or "tpu"
    memory: int | None  # bytes; None = unknown
    bandwidth: float | None = None  # memory bandwidth in bytes per second; None = unknown
    half: str = "bfloat16"  # its 16-bit type
    present: Gpu | None = None  # the GPU of this machine, where there is one
    limited: bool = False  # whether the user set the memory

    def precisions(
        self, stored: str | None, dtype: str, quantize: str | None
    ) -> tuple[Precision, ...]:
        """Return what the flags mean here, the first being preferred; `stored` is the scheme of a
        folder that is quantized."""
        scheme = stored if quantize is None else None if quantize == "none" else quantize
        if dtype != "auto":
            return (Precision(_LONG_NAMES.get(dtype, dtype), scheme),)
        if self.platform == "cpu":  # float32 where it fits
            return (Precision("float32", scheme), Precision(self.half, scheme))
        return (Precision(self.half, scheme),)

    def fits(self, plan: Plan) -> bool | None:
        """Return whether a plan fits; None where the memory is unknown."""
        return None if self.memory is None else plan.total <= self.memory


def find_budget(device: str, limit: int | None = None) -> Budget:
    """Return the budget of a device that is here ("auto", "cpu", "gpu", "tpu"), or of a card that
    is only named; `limit` is what the user allows, in bytes."""
    if device in CARDS:
        card = CARDS[device]
        memory = int(card.memory * GPU_SHARE) if card.platform == "gpu" else card.memory
        found = Budget(device, card.platform, memory, card.bandwidth, card.half)
    else:
        found = _present(device)
    return found if limit is None else replace(found, memory=limit, limited=True)


def _present(device: str) -> Budget:
    gpus = find_nvidia().gpus if device in ("auto", "gpu") and _jax_may_use("cuda") else ()
    if gpus:
        gpu, card = gpus[0], find_card(gpus[0].name)
        memory = min(int(gpu.total * GPU_SHARE), gpu.free) if gpu.total else None
        bandwidth, half = (None, "bfloat16") if card is None else (card.bandwidth, card.half)
        return Budget(gpu.name, "gpu", memory, bandwidth, half, present=gpu)
    if device == "gpu":
        return Budget("the GPU", "gpu", None)
    if device == "tpu" or (device == "auto" and _jax_may_use("tpu") and count_tpus()):
        return Budget("the TPU", "tpu", None)
    return Budget("this processor", "cpu", find_memory().usable)


def _jax_may_use(platform: str) -> bool:
    """Return whether jax has a package for a platform that the environment does not disable."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked and not any(word in asked for word in (platform, "gpu" if platform == "cuda" else "")):
        return False
    modules = {"cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}[platform]
    return any(importlib.util.find_spec(module) is not None for module in modules)


def shared(budget: Budget, devices: int) -> Budget:
    """Return the budget of each of `devices` devices of this host; CPU devices share its memory."""
    if budget.platform != "cpu" or budget.memory is None:
        return budget
    runtime = RUNTIME["cpu"]  # once for all of them
    memory = max(budget.memory - runtime, 0) // max(devices, 1) + runtime
    return replace(budget, memory=memory)


def from_choice(
    choice: ModelChoice, options: EngineOptions, processes: int = 1
) -> tuple[Budget, dict[str, Any]]:
    """Return the budget of each device that the flags name, and what they say of every `Plan`;
    raises UsageError for a bad --mesh, CheckpointError for a --prefix that holds none."""
    more: dict[str, Any] = {
        "chunk": options.prefill_chunk or PREFILL_CHUNK,
        "columns": 1 + options.speculate,
        "prefix": 0,
        "mesh": None,
        "kv": options.kv,
    }
    budget = find_budget(choice.device, options.memory_limit)
    if choice.mesh is not None:
        from glm2_jax.mesh import parse_mesh

        more["mesh"] = sizes_of(parse_mesh(choice.mesh))
        budget = shared(budget, count_devices(more["mesh"]) // processes)
    if choice.prefix is not None:
        from convert.adapters.prefix import measure_prefix

        more["prefix"] = measure_prefix(choice.prefix)
    return budget, more


def check_context(asked: int | None, config: GLMConfig) -> int:
    """Return the context to plan: that asked for, else the default, if the model has as much.

    Raises UsageError for a context that is longer than the model can compute, or has no room for a
    prompt and an answer.
    """
    if asked is None:
        return min(DEFAULT_CONTEXT, config.seq_length)
    limit = config.context_limit
    if not 2 <= asked <= limit:
        raise UsageError(
            f"--max-length must be from 2 to {limit}, got {asked}",
            f"The model's configuration has {limit} positions (seq_length); a prompt and its "
            "answer have at least one token each.",
        )
    return asked


def prepare(
    choice: ModelChoice,
    options: EngineOptions,
    folder: str | Path,
    *,
    rows: int = 1,
    processes: int = 1,
) -> tuple[ModelChoice, EngineOptions]:
    """Plan the memory of the model in `folder` before it is loaded and before jax starts, and set
    the share of a GPU's memory in the environment.

    Returns the flags as they fit `rows` prompts at once, with a mesh over all `processes`: perhaps
    with a narrower dtype and a shorter context. Raises UsageError for a context that the model does
    not have, DeviceError if it cannot fit.
    """
    from convert.loading.folder import open_folder

    try:
        found = open_folder(folder, **choice.form)
    except GLMError:  # loading reports it
        return choice, options
    config, stored = found.config, None if found.scheme is None else found.scheme.name
    asked = options.max_length
    context = check_context(asked, config)
    budget, more = from_choice(choice, options, processes)
    scheme = asked_scheme(
        choice.quantize, choice.quantize_embeddings, stored=stored, model=str(folder)
    )
    wishes = [
        Plan(config, precision, context, rows, budget.platform, **more)
        for precision in budget.precisions(stored, choice.dtype, scheme)
    ]
    plan = settle(budget, wishes, stored, None if asked is not None else note)
    if plan.precision != wishes[0].precision:
        choice = replace(choice, dtype=plan.precision.dtype)
    if plan.context < context:
        options = replace(options, max_length=plan.context)
    set_gpu_share(budget, plan)
    return choice, options


def settle(
    budget: Budget,
    wishes: Sequence[Plan],
    stored: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> Plan:
    """Return the plan to compute with: the first of the wishes, which differ in their precision,
    that fits; raises DeviceError with what does. Where only the context does not fit it is made
    shorter, and `tell` gets a line on it; None = the user asked for just this context."""
    memory = budget.memory
    fitting = [plan for plan in wishes if memory is None or plan.total <= memory]
    if memory is None or fitting:
        return fitting[0]
    plan = wishes[-1]
    near = nearest(plan, memory, precisions(budget.half, stored))
    shorter = [p for p in near if replace(p, context=plan.context) == plan]
    if tell is not None and shorter:
        smaller = " (all fit with --kv int8)" * any(p.kv != plan.kv for p in near)
        tell(
            f"context reduced to {shorter[0].context:,} tokens: {plan.context:,} need "
            f"{human_size(plan.total)}, and {human_size(memory)} is available{smaller}"
        )
        return shorter[0]
    why, fix = "--memory-limit allows", advice(near, plan, stored)
    if not budget.limited:
        why = f"Free on {budget.name}:"
        fix += " (To try anyway: --memory-limit 999GB.)"
    raise DeviceError(f"not enough memory: {needs(plan)}", f"{why} {human_size(memory)}.", fix)


def needs(plan: Plan) -> str:
    """Return the numbers of a plan in a line."""
    rows = "" if plan.batch == 1 else f" x {plan.batch}"
    drafts = "" if plan.columns == 1 else f", --speculate {plan.columns - 1}"
    devices = "" if plan.mesh is None else f" on each of {count_devices(plan.mesh)} devices"
    return (
        f"{human_size(plan.total)} for {plan.precision.name}, {plan.context:,} tokens{rows}{drafts}"
        f"{devices} (weights {human_size(plan.weights)}, cache {human_size(plan.cache)}, "
        f"temporary {human_size(plan.temporary)}, jax itself {human_size(plan.runtime)})"
    )


def advice(near: Sequence[Plan], plan: Plan, stored: str | None) -> str:
    """Return what fits instead, as flags."""
    changes = []
    for other in near:
        now = [flags(other.precision, stored)] if other.precision != plan.precision else []
        for flag, value, wanted in (
            ("--max-length", other.context, plan.context),
            ("--batch-size", other.batch, plan.batch),
            ("--prefill-chunk", other.chunk, plan.chunk),
            ("--speculate", other.columns - 1, plan.columns - 1),
            ("--kv", other.kv, plan.kv),
        ):
            now += [f"{flag} {value}"] if value != wanted else []
        changes.append(f"{' '.join(now)} ({human_size(other.total)})")
    if not changes:
        return "This model does not fit in any precision; a larger device is needed."
    return f"What fits: {'; or '.join(changes)}."


def set_gpu_share(
    budget: Budget, plan: Plan, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Have jax take what the plan needs of a GPU, see `take_gpu_share`."""
    take_gpu_share(budget, max((plan.total - plan.runtime) * SPARE, 1e9), environment)


def take_gpu_share(
    budget: Budget, needed: float, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Have jax take these bytes of a GPU, or all that may be taken, and not three quarters of it,
    unless the user has set something; before jax starts."""
    gpu = budget.present
    if gpu is None or not gpu.total or any(name in environment for name in SHARE_VARIABLES):
        return
    most = min(gpu.total * GPU_SHARE, gpu.free)
    if budget.limited and budget.memory is not None:
        most = min(most, budget.memory)
    share = min(needed, most) / gpu.total
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{int(share * 1000) / 1000:.3f}"
