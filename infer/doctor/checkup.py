"""What the facts about a machine mean: findings with what to do, as pure functions of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from glm2_jax.cli.main import EXIT_DEVICE, named_variable
from glm2_jax.cli.messages import human_size
from glm2_jax.runtime.compile_cache import OFF, VARIABLE
from glm2_jax.runtime.machine import Machine
from infer.doctor.forms import Model, Place, command, places

OK, NOTE, PROBLEM = "ok", "note", "problem"
OLDEST_DRIVER = {"12": 525, "13": 580}  # NVIDIA's minimum for each CUDA version
CHECKPOINT_SIZE = 12.5e9
_INSTALL = 'python -m pip install "glm2-jax[{extra}]"'
_FRESH = "python -m venv fresh && . fresh/bin/activate && pip install -e ."
_DRIVER = "sudo ubuntu-drivers install && sudo reboot"  # others: the page in the finding
_UBUNTU = "On Ubuntu (elsewhere: nvidia.com/drivers):"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    mark: str  # "ok", "note" or "problem"
    text: str
    fix: str = ""  # the command to type; a problem always has one


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    sections: Mapping[str, tuple[Finding, ...]]  # by their titles
    places: tuple[Place, ...]
    best: Place | None  # the one whose best form is recommended; None where none fits
    command: str  # to type next; "" where jax does not work at all

    @property
    def exit_code(self) -> int:
        return 0 if self.places else EXIT_DEVICE

    @property
    def problems(self) -> int:
        return sum(f.mark == PROBLEM for found in self.sections.values() for f in found)


def examine(machine: Machine, model: Model) -> Report:
    """Judge a machine."""
    sections = {
        "Software": tuple(_software(machine)),
        "Devices": tuple(_devices(machine)),
        "Memory": tuple(_memory(machine)),
        "Disk": tuple(_disk(machine)),
    }
    found = places(model, machine)
    best = next((place for place in found if place.best), None)
    return Report(
        sections, found, best, command(model, machine, best and best.best) if found else ""
    )


def _software(machine: Machine) -> Iterator[Finding]:
    yield Finding(OK, f"Python {machine.python} on {machine.system} {machine.arch}")
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    yield Finding(OK, versions or "this Python finds none of our packages")
    if machine.avx is False and machine.arch.lower() in ("x86_64", "amd64"):
        yield Finding(
            PROBLEM,
            "This CPU has no AVX, which jax needs; in a virtual machine it may be hidden.",
            "grep -c avx /proc/cpuinfo  # 0: use another machine, or give the VM the host's CPU",
        )
    yield from _jax(machine)
    yield from _mismatch(machine)


def _jax(machine: Machine) -> Iterator[Finding]:
    if machine.jax.works:
        kinds = [device.kind for device in machine.jax.devices]
        yield Finding(OK, f"jax works; it computes on: {', '.join(kinds)}")
        for line in machine.jax.said:
            yield Finding(NOTE, f"jax said: {line}")
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
        yield Finding(PROBLEM, text, f"unset {named}")
    elif alone:
        yield Finding(PROBLEM, text, "export JAX_PLATFORMS=cpu  # until the cause is fixed")
    else:
        yield Finding(PROBLEM, f"{text} In a fresh environment, in the checkout:", _FRESH)


def _mismatch(machine: Machine) -> Iterator[Finding]:
    jaxlib = machine.packages.get("jaxlib")
    for plugin in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        version = machine.packages.get(plugin)
        if version and jaxlib and _numbers(version)[:3] != _numbers(jaxlib)[:3]:
            yield Finding(
                PROBLEM,
                f"{plugin} {version} does not match jaxlib {jaxlib}; jax will not use it.",
                f"python -m pip install {plugin}=={jaxlib} {plugin[:-6]}pjrt=={jaxlib}",
            )


def _devices(machine: Machine) -> Iterator[Finding]:
    found = [device.platform for device in machine.jax.devices]
    accelerated = any(platform != "cpu" for platform in found)
    yield from _nvidia(machine, "gpu" in found)
    yield from _tpu(machine, "tpu" in found)
    if not (accelerated or machine.nvidia.present or machine.tpus):
        yield Finding(OK, "No GPU or TPU was found; computing on the CPU.")
    if len([p for p in found if p != "cpu"]) > 1:
        yield Finding(NOTE, f"{len(found)} devices; this program uses the first.")
    for name, value in sorted(machine.variables.items()):
        if name.startswith(("XLA_PYTHON_CLIENT_", "JAX_")) or name == "XLA_FLAGS":
            yield Finding(NOTE, f"{name}={value} is set; it changes what jax does.")


def _nvidia(machine: Machine, used: bool) -> Iterator[Finding]:
    nvidia = machine.nvidia
    driver = f", driver {nvidia.driver}" if nvidia.driver else ""
    names = ", ".join(f"{gpu.name} ({human_size(gpu.total)})" for gpu in nvidia.gpus)
    if nvidia.present and used:
        yield Finding(OK, f"NVIDIA GPU: {names or 'found'}{driver}; jax uses it")
        yield from _crowded(machine)
        return
    if not nvidia.present:
        if _cuda(machine) and not used:
            where = "start the container with --gpus all" if machine.container else "lspci shows it"
            yield Finding(NOTE, f"CUDA packages are installed, but no GPU was found ({where}).")
        return
    yield Finding(NOTE, f"NVIDIA GPU: {names or 'found on the bus'}{driver}; jax does not use it")
    yield _why_unused(machine)


def _why_unused(machine: Machine) -> Finding:
    """Return the first reason, in the order in which they have to be fixed."""
    nvidia, cuda, set_to = machine.nvidia, _cuda(machine), machine.variables.get
    major = next(iter(_numbers(nvidia.driver)), None)
    unseen = not nvidia.nodes and not nvidia.gpus
    platforms, visible = set_to("JAX_PLATFORMS", ""), set_to("CUDA_VISIBLE_DEVICES", "0")
    reasons = (
        (
            unseen and machine.container,
            "This container was not given the GPU: there is no /dev/nvidia0. Start it with:",
            "docker run --gpus all ...  # needs nvidia-container-toolkit on the host",
        ),
        (unseen and major is None, f"The NVIDIA driver is not loaded. {_UBUNTU}", _DRIVER),
        (
            major is not None and major < OLDEST_DRIVER["12"],
            f"Driver {nvidia.driver} is too old: CUDA 12 needs {OLDEST_DRIVER['12']} or newer. "
            f"{_UBUNTU}",
            _DRIVER,
        ),
        (
            not cuda,
            "The installed jaxlib supports only the CPU: the CUDA packages are missing.",
            _INSTALL.format(extra="cuda"),
        ),
        (
            cuda == {"13"} and major is not None and major < OLDEST_DRIVER["13"],
            f"Driver {nvidia.driver} is too old for the installed CUDA 13 packages, which need "
            f"{OLDEST_DRIVER['13']} or newer; CUDA 12 works with it.",
            "python -m pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && "
            + _INSTALL.format(extra="cuda"),
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
        (
            "cuda" in set_to("LD_LIBRARY_PATH", "").lower(),
            "LD_LIBRARY_PATH names CUDA libraries, which are used instead of jax's own.",
            "unset LD_LIBRARY_PATH",
        ),
        (nvidia.smi_error, f"nvidia-smi fails: {nvidia.smi_error}. On Ubuntu:", _DRIVER),
        (
            True,
            "The CUDA packages are installed and the driver is new enough; see jax's own message:",
            'JAX_PLATFORMS=cuda python -c "import jax; print(jax.devices())"',
        ),
    )
    text, fix = next((text, fix) for holds, text, fix in reasons if holds)
    return Finding(PROBLEM, text, fix)


def _crowded(machine: Machine) -> Iterator[Finding]:
    """Return memory of GPUs that other programs use."""
    gpus = machine.nvidia.gpus
    for index, gpu in enumerate(gpus):
        if gpu.total - gpu.free > 1e9:
            taken = human_size(gpu.total - gpu.free)
            yield Finding(NOTE, f"Other programs use {taken} of GPU {index}'s memory.")
    freest = max(range(len(gpus)), key=lambda i: gpus[i].free, default=0)
    if gpus and gpus[freest].free - gpus[0].free > 1e9:
        yield Finding(
            NOTE,
            f"GPU {freest} has the most free memory.",
            f"export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={freest}",
        )


def _tpu(machine: Machine, used: bool) -> Iterator[Finding]:
    platforms = machine.variables.get("JAX_PLATFORMS")
    if used:
        yield Finding(OK, "TPU: jax uses it")
    elif not machine.tpus:
        return
    elif "libtpu" not in machine.packages:
        text = "This machine has a TPU, but the package that drives it is missing."
        yield Finding(PROBLEM, text, _INSTALL.format(extra="tpu"))
    elif platforms:
        yield Finding(PROBLEM, f"JAX_PLATFORMS={platforms!r} hides the TPU.", "unset JAX_PLATFORMS")
    else:
        text = "This machine has a TPU, but jax does not find it; often another program uses it."
        yield Finding(PROBLEM, text, "sudo lsof -w /dev/accel* /dev/vfio/*")


def _cuda(machine: Machine) -> set[str]:
    """Return the CUDA versions whose packages are installed: "12", "13"."""
    return {version for version in OLDEST_DRIVER if f"jax-cuda{version}-plugin" in machine.packages}


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _memory(machine: Machine) -> Iterator[Finding]:
    memory = machine.memory
    if memory.total is None:
        yield Finding(NOTE, "This system does not report how much memory it has.")
        return
    free = "" if memory.available is None else f", {human_size(memory.available)} of it free"
    yield Finding(OK, f"Host: {human_size(memory.total)}{free}")
    if memory.limit is not None and memory.limit_left is not None:
        yield Finding(
            NOTE,
            f"This container or job is limited to {human_size(memory.limit)}, "
            f"{human_size(memory.limit_left)} of it left; a program that takes more is killed.",
        )
    for device in machine.jax.devices:
        if device.platform != "cpu" and device.memory:
            yield Finding(OK, f"{device.kind}: jax may use {human_size(device.memory)}")


def _disk(machine: Machine) -> Iterator[Finding]:
    for disk in machine.disks:
        if disk.free is None:
            yield Finding(NOTE, f"{disk.purpose} ({disk.folder}): free space unknown")
            continue
        text = f"{disk.purpose} ({disk.folder}): {human_size(disk.free)} free"
        small = disk.purpose == "downloads" and disk.free < CHECKPOINT_SIZE
        text += f"; a 6B checkpoint has {human_size(CHECKPOINT_SIZE)}" if small else ""
        fix = "export HF_HOME=/a/larger/disk" if small else ""
        yield Finding(NOTE if small else OK, text, fix)
    cache = machine.cache
    if cache.folder == OFF:
        yield Finding(NOTE, f"Compiled programs are not cached ({VARIABLE}=off): starts are slow.")
    elif not cache.writable:
        yield Finding(
            PROBLEM,
            f"{cache.folder}, the cache of compiled programs, is not writable: every start "
            "compiles again.",
            f'export {VARIABLE}="$(mktemp -d)"',
        )
    elif cache.exists:
        size = human_size(cache.size)
        yield Finding(OK, f"compiled programs: {cache.programs} cached, {size}, in {cache.folder}")
    else:
        yield Finding(OK, f"compiled programs: none yet; they will be cached in {cache.folder}")
