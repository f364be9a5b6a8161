"""The memory that a model may take on this machine, and what to do where that is too little.

Nothing here starts jax, so that what is decided (the share of a GPU's memory, the platform) still
counts when it starts.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.config import GLMConfig
from glm2_jax.errors import DeviceError, GLMError, UsageError
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.runtime.host_memory import find_memory
from glm2_jax.runtime.machine import Gpu
from glm2_jax.runtime.probing import count_tpus, find_nvidia
from glm2_jax.schemes import asked_scheme
from infer.memory.cards import CARDS, find_card
from infer.memory.plan import GPU_SHARE, RUNTIME, SHARE_VARIABLES, Plan, flags, make_plan, nearest
from infer.memory.precision import Precision, precisions
from infer.memory.shares import Sizes, sizes_of

DEFAULT_CONTEXT = 8192  # of --max-length
SPARE = 1.1  # of a plan, for what a pool cannot use between its pieces
_LONG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Budget:
    """Where a model is to compute, and what it may take there.

    Attributes:
      name: of the device, for people.
      platform: "cpu", "gpu", "tpu".
      memory: bytes; None = unknown.
      bandwidth: of that memory, bytes per second; None = unknown.
      half: its 16-bit type.
      present: the GPU that is here, where there is one.
      limited: whether the user set the memory.
    """

    name: str
    platform: str
    memory: int | None
    bandwidth: float | None = None
    half: str = "bfloat16"
    present: Gpu | None = None
    limited: bool = False

    def precisions(
        self, stored: str | None, dtype: str, quantize: str | None
    ) -> tuple[Precision, ...]:
        """What flags mean here, the first being what would be taken.

        Args:
          stored: the scheme of a folder that is quantized.
          dtype, quantize: the flags.
        """
        scheme = stored if quantize is None else None if quantize == "none" else quantize
        if dtype != "auto":
            return (Precision(_LONG_NAMES.get(dtype, dtype), scheme),)
        if self.platform == "cpu":  # float32 where it fits
            return (Precision("float32", scheme), Precision(self.half, scheme))
        return (Precision(self.half, scheme),)


def find_budget(device: str, limit: int | None = None) -> Budget:
    """The budget of a device that is here, or of one that is only named.

    Args:
      device: "auto", "cpu", "gpu", "tpu", or one of `infer.devices.CARDS`.
      limit: bytes that the user allows.
    """
    found = _named(device) if device in CARDS else _present(device)
    if limit is None:
        return found
    return dataclasses.replace(found, memory=limit, limited=True)


def _named(name: str) -> Budget:
    card = CARDS[name]
    memory = int(card.memory * GPU_SHARE) if card.platform == "gpu" else card.memory
    half = "float16" if name in ("t4", "v100") else "bfloat16"
    return Budget(name, card.platform, memory, card.bandwidth, half)


def _present(device: str) -> Budget:
    gpus = find_nvidia().gpus if device in ("auto", "gpu") and _jax_may_use("cuda") else ()
    if gpus:
        gpu = gpus[0]
        card = find_card(gpu.name)
        memory = min(int(gpu.total * GPU_SHARE), gpu.free) if gpu.total else None
        half = "float16" if card is not None and card.name in ("t4", "v100") else "bfloat16"
        bandwidth = None if card is None else card.bandwidth
        return Budget(gpu.name, "gpu", memory, bandwidth, half, present=gpu)
    if device == "gpu" or (device in ("auto", "tpu") and _jax_may_use("tpu") and count_tpus()):
        return Budget(
            "the GPU" if device == "gpu" else "the TPU", device.replace("auto", "tpu"), None
        )
    if device == "tpu":
        return Budget("the TPU", "tpu", None)
    return Budget("this processor", "cpu", find_memory().usable)


def _jax_may_use(platform: str) -> bool:
    """Whether jax has a package for it and is not told to leave it alone."""
    import importlib.util

    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked and not any(word in asked for word in (platform, "gpu" if platform == "cuda" else "")):
        return False
    modules = {"cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}[platform]
    return any(importlib.util.find_spec(module) is not None for module in modules)


def check_context(asked: int | None, seq_length: int) -> None:
    """Raises UsageError for a context that is longer than the model's table of positions, or has
    no room for a prompt and an answer."""
    if asked is not None and asked < 2:
        raise UsageError(
            f"--max-length {asked} is too short",
            "A prompt and its answer have a token each, at least.",
            "Use --max-length 2 or more.",
        )
    if asked is not None and asked > seq_length:
        raise UsageError(
            f"--max-length {asked} is more than the model has",
            f"Its configuration (seq_length) knows {seq_length} positions.",
            f"Use --max-length {seq_length} or less.",
        )


def prepare(
    choice: ModelChoice,
    options: EngineOptions,
    folder: str | Path,
    *,
    rows: int = 1,
    processes: int = 1,
) -> tuple[ModelChoice, EngineOptions]:
    """Plan the memory of a model that is about to be loaded, before jax starts.

    Sets the share of a GPU's memory in the environment.

    Args:
      choice, options: the flags.
      folder: the checkpoint.
      rows: prompts that are answered together.
      processes: of the run, over which a mesh is spread.

    Returns:
      The flags as they fit: perhaps a narrower dtype and a shorter context.

    Raises:
      UsageError: a context that the model does not have. DeviceError: it cannot fit.
    """
    from convert.loading.folder import open_folder

    try:
        found = open_folder(folder, **choice.form)
    except GLMError:  # loading reports it
        return choice, options
    config, stored = found.config, None if found.scheme is None else found.scheme.name
    mesh, asked = mesh_sizes(choice.mesh), options.max_length
    check_context(asked, config.seq_length)
    budget = share_budget(find_budget(choice.device, options.memory_limit), mesh, processes)
    scheme = asked_scheme(
        choice.quantize, choice.quantize_embeddings, stored=stored, model=str(folder)
    )
    wish = Wish(
        config,
        budget.precisions(stored, choice.dtype, scheme),
        min(asked or DEFAULT_CONTEXT, config.seq_length),
        rows,
        stored,
        fixed_context=asked is not None,
        chunk=options.prefill_chunk or PREFILL_CHUNK,
        columns=1 + options.speculate,
        prefix=prefix_tokens(choice.prefix),
        mesh=mesh,
    )
    plan = settle(budget, wish, note)
    if plan.precision != wish.choices[0]:
        choice = dataclasses.replace(choice, dtype=plan.precision.dtype)
    if plan.context < wish.context:
        options = dataclasses.replace(options, max_length=plan.context)
    set_gpu_share(budget, plan)
    return choice, options


def mesh_sizes(mesh: str | None) -> Sizes | None:
    """Return the sizes of the value of `--mesh`; None = one device.

    Raises:
      UsageError: it is not a mesh.
    """
    if mesh is None:
        return None
    from glm2_jax.mesh import parse_mesh

    return sizes_of(parse_mesh(mesh))


def share_budget(budget: Budget, mesh: Sizes | None, processes: int) -> Budget:
    """Return what each device of a mesh may take."""
    return budget if mesh is None else shared(budget, count_devices(mesh) // processes)


def shared(budget: Budget, devices: int) -> Budget:
    """What each of so many devices of this host may take: where a processor plays them, they share
    its memory."""
    if budget.platform != "cpu" or budget.memory is None:
        return budget
    runtime = RUNTIME["cpu"]  # once for all of them
    memory = max(budget.memory - runtime, 0) // max(devices, 1) + runtime
    return dataclasses.replace(budget, memory=memory)


def count_devices(mesh: Sizes) -> int:
    """The devices of a mesh."""
    return math.prod(size for _, size in mesh)


def prefix_tokens(folder: str | None) -> int:
    """Return the tokens of a prefix; 0 for None.

    Raises:
      CheckpointError: the folder does not hold a prefix.
    """
    if folder is None:
        return 0
    from convert.adapters.prefix import measure_prefix

    return measure_prefix(folder)


@dataclass(frozen=True)
class Wish:
    """What is to be answered with, as far as it decides the memory.

    Attributes:
      choices: what may be computed in, the first being preferred.
      stored: the scheme of a folder that is quantized.
      fixed_context: whether the user asked for just this context.
      columns: tokens of each row that a step reads: one, and the drafts that it verifies.
      prefix: slots of each row before all tokens.
      mesh: over which the model is spread.
    """

    config: GLMConfig
    choices: Sequence[Precision]
    context: int
    batch: int = 1
    stored: str | None = None
    fixed_context: bool = False
    chunk: int = PREFILL_CHUNK
    columns: int = 1
    prefix: int = 0
    mesh: Sizes | None = None

    def plan(self, precision: Precision, platform: str) -> Plan:
        return make_plan(
            self.config,
            precision,
            self.context,
            self.batch,
            platform=platform,
            chunk=self.chunk,
            columns=self.columns,
            prefix=self.prefix,
            mesh=self.mesh,
        )


def settle(budget: Budget, wish: Wish, tell: Callable[[str], None]) -> Plan:
    """The plan that is to be computed with: what was wished, where it fits.

    Where only the default context does not fit, it is made shorter, and `tell` gets a line on it.

    Raises:
      DeviceError: it does not fit; with the numbers and what does.
    """
    plans = [wish.plan(precision, budget.platform) for precision in wish.choices]
    memory = budget.memory
    if memory is None:
        return plans[0]
    fitting = next((plan for plan in plans if plan.total <= memory), None)
    if fitting is not None:
        return fitting
    plan = plans[-1]
    near = _near(budget, wish, plan, memory)
    shorter = next((p for p in near if only_shorter(p, plan)), None)
    if shorter is not None and not wish.fixed_context:
        tell(
            f"memory for {shorter.context:,} tokens of prompt and answer: {human_size(plan.total)} "
            f"would be needed for {plan.context:,}, {human_size(memory)} can be had"
        )
        return shorter
    why = "--memory-limit allows" if budget.limited else f"Free on {budget.name}:"
    fix = advice(near, plan, wish.stored)
    if not budget.limited:
        fix += " (--memory-limit 999GB tries it all the same.)"
    raise DeviceError(
        f"not enough memory: {needs(plan)}",
        f"{why} {human_size(memory)}.",
        fix,
    )


def only_shorter(other: Plan, plan: Plan) -> bool:
    """Whether a plan differs from another in its context alone."""
    kept = ("precision", "batch", "chunk", "columns")
    return all(getattr(other, name) == getattr(plan, name) for name in kept)


def needs(plan: Plan) -> str:
    """The numbers of a plan in a line."""
    parts = (
        ("weights", plan.weights),
        ("cache", plan.cache),
        ("temporary", plan.temporary),
        ("jax itself", plan.runtime),
    )
    sizes = ", ".join(f"{name} {human_size(size)}" for name, size in parts)
    rows = "" if plan.batch == 1 else f" x {plan.batch}"
    drafts = "" if plan.columns == 1 else f", --speculate {plan.columns - 1}"
    devices = "" if plan.mesh is None else f" on each of {count_devices(plan.mesh)} devices"
    what = f"{plan.precision.name}, {plan.context:,} tokens{rows}{drafts}{devices}"
    return f"{human_size(plan.total)} for {what} ({sizes})"


def _near(budget: Budget, wish: Wish, plan: Plan, memory: int) -> list[Plan]:
    choices = precisions(budget.half, wish.stored)
    return nearest(wish.config, plan, memory, choices, platform=budget.platform)


def advice(near: Sequence[Plan], plan: Plan, stored: str | None) -> str:
    """What fits instead, as flags."""
    if not near:
        return "Nothing of this model fits; a larger device is needed."
    return f"What fits: {'; or '.join(_change(other, plan, stored) for other in near)}."


def _change(other: Plan, plan: Plan, stored: str | None) -> str:
    changes = []
    if other.precision != plan.precision:
        changes.append(flags(other.precision, stored))
    if other.context != plan.context:
        changes.append(f"--max-length {other.context}")
    if other.batch != plan.batch:
        changes.append(f"--batch-size {other.batch}")
    if other.chunk != plan.chunk:
        changes.append(f"--prefill-chunk {other.chunk}")
    if other.columns != plan.columns:
        changes.append(f"--speculate {other.columns - 1}")
    return f"{' '.join(changes)} ({human_size(other.total)})"


def shortage(budget: Budget, wish: Wish, precision: Precision) -> tuple[str, str]:
    """What to say when memory ran out in spite of the plan: (needed and free, what fits)."""
    plan = wish.plan(precision, budget.platform)
    # It did not fit, whatever the plan says: what is advised is smaller in any case.
    memory = plan.total - 1 if budget.memory is None else min(budget.memory, plan.total - 1)
    free = "not known" if budget.memory is None else human_size(budget.memory)
    near = _near(budget, wish, plan, memory)
    return f"Needed: {needs(plan)}; free: {free}.", advice(near, plan, wish.stored)


def set_gpu_share(
    budget: Budget, plan: Plan, environment: MutableMapping[str, str] = os.environ
) -> float | None:
    """Has jax take what the plan needs of a GPU, and not three quarters of it; before jax starts.

    Returns:
      The share, or None where nothing was set: no GPU, or the user has set something.
    """
    gpu = budget.present
    if gpu is None or not gpu.total or any(name in environment for name in SHARE_VARIABLES):
        return None
    most = min(gpu.total * GPU_SHARE, gpu.free)
    if budget.limited and budget.memory is not None:
        most = min(most, budget.memory)
    share = min(max((plan.total - plan.runtime) * SPARE, 1e9), most) / gpu.total
    share = int(share * 1000) / 1000
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{share:.3f}"
    return share
