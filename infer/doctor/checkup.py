"""What the facts about a machine mean: findings with what to do, the form of a model that fits, and
the command to run it; pure functions of the facts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from glm2_jax.cli.commands import as_typed
from glm2_jax.cli.main import named_variable
from glm2_jax.cli.messages import human_size
from glm2_jax.config import PRESETS, GLMConfig
from glm2_jax.extras import pip_install
from glm2_jax.runtime.compile_cache import OFF, VARIABLE
from glm2_jax.runtime.machine import Device, Machine
from infer.memory.budget import DEFAULT_CONTEXT, GPU_SHARE, SHARE_VARIABLES, Budget
from infer.memory.plan import Plan
from infer.memory.precision import flags, precisions

OLDEST_DRIVER = {"12": 525, "13": 580}  # NVIDIA's minimum for each CUDA version
CHECKPOINT_SIZE = 12.5e9
_INSTALL_CUDA = f"python -m {pip_install('cuda')}"
_FRESH = "python -m venv fresh && . fresh/bin/activate && pip install -e ."
_DRIVER = "sudo ubuntu-drivers install && sudo reboot"  # others: the page in the finding
_UBUNTU = "On Ubuntu (elsewhere: nvidia.com/drivers):"
PROMPT = "你好"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    mark: str  # "ok", "note" or "problem"
    text: str
    fix: str = ""  # the command to type; a problem always has one


ok, note, problem = (partial(Finding, mark) for mark in ("ok", "note", "problem"))


def examine(machine: Machine) -> dict[str, tuple[Finding, ...]]:
    """Judge a machine; the findings by the title of their section."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    software = (
        ok(f"Python {machine.python} on {machine.system} {machine.arch}"),
        ok(versions or "this Python finds none of our packages"),
    )
    return {
        "Software": (*software, *_jax(machine), *_mismatch(machine)),
        "Devices": tuple(_devices(machine)),
        "Memory": tuple(_memory(machine)),
        "Disk": (*_disks(machine), _compile_cache(machine)),
    }


def _jax(machine: Machine) -> Iterator[Finding]:
    if machine.jax.works:
        kinds = ", ".join(device.kind for device in machine.jax.devices)
        yield ok(f"jax works; it computes on: {kinds}")
        yield from (note(f"jax said: {line}") for line in machine.jax.said)
        return
    text = f"jax does not work: {machine.jax.error}."
    if machine.jax.said and machine.jax.said[-1] not in machine.jax.error:  # a crash or a hang
        text += f" Its last message: {machine.jax.said[-1]}"
    named = named_variable(text, machine.variables)
    alone = machine.jax_on_cpu is not None and machine.jax_on_cpu.works
    if alone:
        text += " It works on the CPU only."
        if "JAX_PLATFORMS" in machine.variables:
            named = named or "JAX_PLATFORMS"
    if named is not None:
        yield problem(text, f"unset {named}")
    elif alone:
        yield problem(text, "export JAX_PLATFORMS=cpu  # until the cause is fixed")
    else:
        yield problem(f"{text} In a fresh environment, in the checkout:", _FRESH)


def _mismatch(machine: Machine) -> Iterator[Finding]:
    jaxlib = machine.packages.get("jaxlib")
    for plugin in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        version = machine.packages.get(plugin)
        if version and jaxlib and _numbers(version)[:3] != _numbers(jaxlib)[:3]:
            yield problem(
                f"{plugin} {version} does not match jaxlib {jaxlib}; jax will not use it.",
                f"python -m pip install {plugin}=={jaxlib} {plugin[:-6]}pjrt=={jaxlib}",
            )


def _devices(machine: Machine) -> Iterator[Finding]:
    found = [device.platform for device in machine.jax.devices]
    yield from _nvidia(machine, "gpu" in found)
    yield from _tpu(machine, "tpu" in found)
    others = [platform for platform in found if platform != "cpu"]
    if not (others or machine.nvidia.present or machine.tpus):
        yield ok("No GPU or TPU was found; computing on the CPU.")
    if len(others) > 1:
        yield note(f"{len(found)} devices; this program uses the first.")
    for name, value in sorted(machine.variables.items()):
        if name.startswith(("XLA_PYTHON_CLIENT_", "JAX_")) or name == "XLA_FLAGS":
            yield note(f"{name}={value} is set; it changes what jax does.")


def _nvidia(machine: Machine, used: bool) -> Iterator[Finding]:
    nvidia = machine.nvidia
    driver = f", driver {nvidia.driver}" if nvidia.driver else ""
    names = ", ".join(f"{gpu.name} ({human_size(gpu.total)})" for gpu in nvidia.gpus)
    if nvidia.present and used:
        yield ok(f"NVIDIA GPU: {names or 'found'}{driver}; jax uses it")
        for index, gpu in enumerate(nvidia.gpus):
            if (taken := gpu.total - gpu.free) > 1e9:
                yield note(f"Other programs use {human_size(taken)} of GPU {index}'s memory.")
    elif nvidia.present:
        yield note(f"NVIDIA GPU: {names or 'found on the bus'}{driver}; jax does not use it")
        yield _why_unused(machine)
    elif _cuda(machine) and not used:
        where = "start the container with --gpus all" if machine.container else "lspci shows it"
        yield note(f"CUDA packages are installed, but no GPU was found ({where}).")


def _why_unused(machine: Machine) -> Finding:
    """Return the first reason, in the order in which they have to be fixed."""
    nvidia, cuda, set_to = machine.nvidia, _cuda(machine), machine.variables.get
    major = next(iter(_numbers(nvidia.driver)), None)
    unseen = not nvidia.nodes and not nvidia.gpus
    platforms, visible = set_to("JAX_PLATFORMS", ""), set_to("CUDA_VISIBLE_DEVICES", "0")
    old = f"Driver {nvidia.driver} is too old"
    reasons = (
        (
            unseen and machine.container,
            "This container was not given the GPU: there is no /dev/nvidia0. Start it with:",
            "docker run --gpus all ...  # needs nvidia-container-toolkit on the host",
        ),
        (unseen and major is None, f"The NVIDIA driver is not loaded. {_UBUNTU}", _DRIVER),
        (
            major is not None and major < OLDEST_DRIVER["12"],
            f"{old}: CUDA 12 needs {OLDEST_DRIVER['12']} or newer. {_UBUNTU}",
            _DRIVER,
        ),
        (
            not cuda,
            "The installed jaxlib supports only the CPU: the CUDA packages are missing.",
            _INSTALL_CUDA,
        ),
        (
            cuda == {"13"} and major is not None and major < OLDEST_DRIVER["13"],
            f"{old} for the installed CUDA 13 packages, which need {OLDEST_DRIVER['13']} or "
            "newer; CUDA 12 works with it.",
            f"python -m pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && {_INSTALL_CUDA}",
        ),
        (
            platforms and not re.search("cuda|gpu", platforms),
            f"JAX_PLATFORMS={platforms!r} hides the GPU from jax.",
            "unset JAX_PLATFORMS",
        ),
        (
            visible.strip() in ("", "-1", "NoDevFiles"),
            f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPU from jax.",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (nvidia.smi_error, f"nvidia-smi fails: {nvidia.smi_error}. On Ubuntu:", _DRIVER),
        (
            True,
            "The CUDA packages are installed and the driver is new enough; see jax's own message:",
            'JAX_PLATFORMS=cuda python -c "import jax; print(jax.devices())"',
        ),
    )
    return next(problem(text, fix) for holds, text, fix in reasons if holds)


def _tpu(machine: Machine, used: bool) -> Iterator[Finding]:
    platforms = machine.variables.get("JAX_PLATFORMS")
    if used:
        yield ok("TPU: jax uses it")
    elif not machine.tpus:
        return
    elif "libtpu" not in machine.packages:
        yield problem(
            "This machine has a TPU, but the package that drives it is missing.",
            f"python -m {pip_install('tpu')}",
        )
    elif platforms:
        yield problem(f"JAX_PLATFORMS={platforms!r} hides the TPU.", "unset JAX_PLATFORMS")
    else:
        yield problem(
            "This machine has a TPU, but jax does not find it; often another program uses it.",
            "sudo lsof -w /dev/accel* /dev/vfio/*",
        )


def _cuda(machine: Machine) -> set[str]:
    """Return the CUDA versions whose packages are installed: "12", "13"."""
    return {version for version in OLDEST_DRIVER if f"jax-cuda{version}-plugin" in machine.packages}


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _memory(machine: Machine) -> Iterator[Finding]:
    memory = machine.memory
    if memory.total is None:
        yield note("This system does not report how much memory it has.")
        return
    free = "" if memory.available is None else f", {human_size(memory.available)} of it free"
    yield ok(f"Host: {human_size(memory.total)}{free}")
    if memory.limit is not None and memory.limit_left is not None:
        yield note(
            f"This container or job is limited to {human_size(memory.limit)}, "
            f"{human_size(memory.limit_left)} of it left; a program that takes more is killed."
        )
    for device in machine.jax.devices:
        if device.platform != "cpu" and device.memory:
            yield ok(f"{device.kind}: jax may use {human_size(device.memory)}")


def _disks(machine: Machine) -> Iterator[Finding]:
    for disk in machine.disks:
        where = f"{disk.purpose} ({disk.folder}):"
        if disk.free is None:
            yield note(f"{where} free space unknown")
        elif disk.purpose == "downloads" and disk.free < CHECKPOINT_SIZE:
            yield note(
                f"{where} {human_size(disk.free)} free; a 6B checkpoint has "
                f"{human_size(CHECKPOINT_SIZE)}",
                "export HF_HOME=/a/larger/disk",
            )
        else:
            yield ok(f"{where} {human_size(disk.free)} free")


def _compile_cache(machine: Machine) -> Finding:
    cache = machine.cache
    if cache.folder == OFF:
        return note(f"Compiled programs are not cached ({VARIABLE}=off): starts are slow.")
    if not cache.writable:
        return problem(
            f"{cache.folder}, the cache of compiled programs, is not writable: every start "
            "compiles again.",
            f'export {VARIABLE}="$(mktemp -d)"',
        )
    if not cache.exists:
        return ok(f"compiled programs: none yet; they will be cached in {cache.folder}")
    size = human_size(cache.size)
    return ok(f"compiled programs: {cache.programs} cached, {size}, in {cache.folder}")


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
