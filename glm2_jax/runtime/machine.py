"""The facts about this machine that matter here, found without importing jax.

Everything that can crash or hang (jax with its plugins, nvidia-smi) runs in a separate process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glm2_jax.cli.main import version
from glm2_jax.runtime.compile_cache import OFF, user_cache
from glm2_jax.runtime.host_memory import Memory, find_memory, read_text

_CUDA = [f"jax-cuda{version}-{part}" for version in (12, 13) for part in ("plugin", "pjrt")]
_PACKAGES = ("glm2-jax", "jax", "jaxlib", "flax", *_CUDA, "libtpu")
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "XLA_FLAGS")
_JAX_SECONDS = 180.0  # an accelerator that starts cold on a slow disk takes most of a minute
_TOOL_SECONDS = 20.0
# Ids of TPUs on the PCI bus, as jax knows them.
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")

# Runs in the child; it prints a line for each stage, so that a crash or a hang shows where it was.
_JAX_PROBE = """
import json, os, sys
def stage(name): print("stage " + name, flush=True)
stage("import jax")
import jax, jax.numpy as jnp
stage("import flax")
import flax.linen
stage("find devices")
try: devices = jax.local_devices()
except AssertionError:  # which has no message
    sys.exit("jax cannot initialize any of JAX_PLATFORMS=" + os.environ.get("JAX_PLATFORMS", ""))
stage("compute")
assert float((jnp.ones(8) + 1).sum()) == 16
found = []
for device in devices:
    try: stats = device.memory_stats() or {}
    except Exception: stats = {}
    found.append({"platform": device.platform, "kind": device.device_kind,
                  "memory": stats.get("bytes_limit"),
                  "capability": str(getattr(device, "compute_capability", "") or "")})
print(json.dumps(found))
"""
_UNIMPORTANT = re.compile(
    r"^(Traceback|  |WARNING: All log messages|During handling|The above exc|\s*$"
    r"|-{20}$|For simplicity, JAX)"
)
_MARKUP = re.compile(r"^([IWEF]\d{4} [^\]]*\]|(ERROR|WARNING|INFO):.*?[a-z_]:\d+:)\s*")


@dataclass(frozen=True)
class Device:
    """A device that jax found; `memory` is what jax may use, in bytes, if known."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str
    memory: int | None = None
    capability: str = ""  # of NVIDIA GPUs, e.g. "9.0"


@dataclass(frozen=True)
class JaxProbe:
    """What jax did in a separate process."""

    devices: tuple[Device, ...] = ()
    error: str = ""  # one line; "" if jax works
    said: tuple[str, ...] = ()  # the important lines of its standard error

    @property
    def works(self) -> bool:
        return not self.error


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as nvidia-smi lists it; bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Nvidia:
    """Signs of NVIDIA GPUs."""

    on_bus: int = 0  # GPUs on the PCI bus
    nodes: int = 0  # device files, /dev/nvidia0 or /dev/dxg
    driver: str = ""  # version of the kernel driver, "" if it is not loaded
    gpus: tuple[Gpu, ...] = ()  # what nvidia-smi lists
    smi_error: str = ""  # why nvidia-smi gave no list; "" if it did, or is not installed

    @property
    def present(self) -> bool:
        return bool(self.on_bus or self.nodes or self.gpus)


@dataclass(frozen=True)
class Disk:
    """Free bytes of the disk that a folder is on; None = unknown."""

    purpose: str
    folder: str
    free: int | None


@dataclass(frozen=True)
class Cache:
    """The folder of compiled programs; `folder` is "off" if they are not kept."""

    folder: str
    exists: bool = False
    writable: bool = True
    programs: int = 0
    size: int = 0


@dataclass(frozen=True)
class Machine:
    """Everything that the doctor judges."""

    system: str = "Linux"
    arch: str = "x86_64"
    python: str = "3.11"
    container: bool = False
    packages: Mapping[str, str] = field(default_factory=dict)  # installed ones: name -> version
    variables: Mapping[str, str] = field(default_factory=dict)  # that change what jax does
    jax: JaxProbe = JaxProbe()
    jax_on_cpu: JaxProbe | None = None  # tried without accelerators if jax failed with them
    nvidia: Nvidia = Nvidia()
    tpus: int = 0
    memory: Memory = Memory()
    disks: tuple[Disk, ...] = ()
    cache: Cache = Cache(OFF)


def probe() -> Machine:
    """Look at this machine; takes as long as starting jax does."""
    nvidia = find_nvidia()  # before jax, which may itself take GPU memory
    jax, cache = probe_jax(), find_cache()
    containers = (Path("/.dockerenv"), Path("/run/.containerenv"))
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or f"{user_cache}/huggingface"
    downloads = os.environ.get("HF_HUB_CACHE") or f"{hub}/hub"
    folders = {"current folder": ".", "downloads": downloads, "compiled programs": cache.folder}
    return Machine(
        system=platform.system(),
        arch=platform.machine(),
        python=platform.python_version(),
        container=any(path.exists() for path in containers)
        or "KUBERNETES_SERVICE_HOST" in os.environ,
        packages=_installed(),
        variables={
            name: value
            for name, value in sorted(os.environ.items())
            if name in _VARIABLES or name.startswith(("XLA_PYTHON_CLIENT_", "JAX_"))
        },
        jax=jax,
        jax_on_cpu=None if jax.works else probe_jax({"JAX_PLATFORMS": "cpu"}),
        nvidia=nvidia,
        tpus=count_tpus(),
        memory=find_memory(),
        disks=tuple(
            Disk(use, path, free_space(path)) for use, path in folders.items() if path != OFF
        ),
        cache=cache,
    )


def _installed() -> dict[str, str]:
    """Return the versions of those of `_PACKAGES` that are installed; imports none of them."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe_software() -> str:
    """Return one line for reports: the versions of this package, of its libraries, the system."""
    versions = [f"{name} {number}" for name, number in _installed().items() if name != "glm2-jax"]
    system = f"{platform.system()} {platform.machine()}"
    return ", ".join([version(), *versions, f"Python {platform.python_version()}", system])


def describe_device(device: Any) -> str:
    """Return the name of a `jax.Device` for reports; of a GPU with the version of its driver."""
    if device.platform == "cpu":
        return processor()
    driver = find_nvidia().driver if device.platform == "gpu" else ""
    return device.device_kind + (f", driver {driver}" if driver else "")


def processor() -> str:
    """Return the name of the processor."""
    match = re.search(r"^model name\s*:\s*(.+)$", read_text(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float:
    """Return how many programs wanted to run in the last minute; 0 = the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def vector_units() -> str:
    """Return what the processor can compute in vectors, as far as it decides which form is fast."""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", read_text(Path("/proc/cpuinfo")), re.M)
    known = re.compile(r"avx2|fma|avx512(f|_bf16|_vnni|_fp16)|amx_\w+|asimd\w*|sve\w*|bf16|i8mm")
    return " ".join(sorted(f for f in flags[1].split() if known.fullmatch(f))) if flags else ""


def _run(command: list[str], seconds: float, env: Mapping[str, str]) -> tuple[int | None, str, str]:
    """Run a program that may hang: (status or None if it was killed, its output, its errors)."""
    # Files, not pipes: nothing can wait for a reader, and the output of a killed program stays.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=os.environ | dict(env)
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            process.kill()
            # Even SIGKILL does not end a process that is stuck in the driver.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        out.seek(0)
        err.seek(0)
        return status, out.read().decode("utf-8", "replace"), err.read().decode("utf-8", "replace")


def probe_jax(
    env: Mapping[str, str] | None = None, *, code: str = _JAX_PROBE, seconds: float = _JAX_SECONDS
) -> JaxProbe:
    """Start jax in a separate process, with additional variables `env`, and compute something."""
    # Without preallocation the test also works while another program uses the GPU.
    quiet = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "1"}
    try:
        # Without -P a file of the user's in this folder, such as jax.py, would be imported.
        command = [sys.executable, "-P", "-c", code]
        status, out, err = _run(command, seconds, quiet | dict(env or {}))
    except OSError as error:
        return JaxProbe(error=f"Python could not be started: {error.strerror}")
    said = important_lines(err)
    if status == 0:
        devices = json.loads(out.strip().splitlines()[-1])
        return JaxProbe(tuple(Device(**device) for device in devices), said=said)
    if status is None:
        error = f"no answer within {seconds:.0f} seconds"
    elif status < 0:
        error = f"crashed with signal {-status}"
    else:
        error = said[-1] if said else f"exit status {status}"
    stages = re.findall(r"^stage (.*)$", out, flags=re.MULTILINE)
    return JaxProbe(error=error + (f" (at: {stages[-1]})" if stages else ""), said=said)


def important_lines(text: str) -> tuple[str, ...]:
    """Return the last few important lines of a log, without time stamps, each once."""
    lines = [line for line in text.splitlines() if not _UNIMPORTANT.match(line)]
    clean = [_MARKUP.sub("", line).strip()[:300] for line in lines]
    return tuple(dict.fromkeys(line for line in clean if line))[-4:]


def find_nvidia(root: Path = Path("/")) -> Nvidia:
    """Look for NVIDIA GPUs: on the bus, in /dev, in the driver, and with nvidia-smi."""
    found = _ask_nvidia_smi()
    text = read_text(root / "proc/driver/nvidia/version")
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(\.\d+)?)\s", text)
    return replace(
        found,
        on_bus=len(_pci(root, "0x10de", "0x03")),
        nodes=len([*root.glob("dev/nvidia[0-9]*"), *root.glob("dev/dxg")]),
        driver=match[1] if match else found.driver,
    )


def _ask_nvidia_smi() -> Nvidia:
    if not (tool := shutil.which("nvidia-smi")):
        return Nvidia()
    query = "--query-gpu=driver_version,memory.total,memory.free,name"
    try:
        status, out, err = _run([tool, query, "--format=csv,noheader,nounits"], _TOOL_SECONDS, {})
    except OSError as error:
        return Nvidia(smi_error=str(error.strerror))
    if status != 0:
        said = [*important_lines(f"{err}\n{out}"), f"status {status}"]
        return Nvidia(smi_error="no answer" if status is None else said[0])
    return parse_nvidia_smi(out)


def parse_nvidia_smi(text: str) -> Nvidia:
    """Read lines of "driver, MiB in all, MiB free, name"."""

    def size(cell: str) -> int:  # "[N/A]" on GPUs that share the host's memory
        return int(cell) * 2**20 if cell.isdecimal() else 0

    rows = [[cell.strip() for cell in line.split(",", 3)] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    if not rows:
        return Nvidia(smi_error="nvidia-smi lists no GPU")
    gpus = tuple(Gpu(name, size(total), size(free)) for _, total, free, name in rows)
    return Nvidia(driver=rows[0][0], gpus=gpus)


def count_tpus(root: Path = Path("/")) -> int:
    """Count Google TPUs by their device files, or by their ids on the PCI bus (as jax does)."""
    on_bus = [d for d in _pci(root, "0x1ae0") if read_text(d / "device").strip() in _TPUS]
    return max(len(list(root.glob("dev/accel[0-9]*"))), len(on_bus))


def _pci(root: Path, vendor: str, kind: str = "") -> list[Path]:
    """Return the PCI devices of a vendor whose class begins with `kind`."""
    return [
        device
        for device in root.glob("sys/bus/pci/devices/*")
        if read_text(device / "vendor").strip() == vendor
        and read_text(device / "class").startswith(kind)
    ]


def free_space(folder: str) -> int | None:
    """Return the free bytes of the disk that a folder is on, or would be on; None = unknown."""
    try:
        return shutil.disk_usage(_existing(Path(folder).expanduser().absolute())).free
    except (OSError, RuntimeError):
        return None


def find_cache() -> Cache:
    """Return the state of the folder of compiled programs; nothing is created or written."""
    try:
        folder = user_cache()
    except RuntimeError:  # no home folder
        return Cache("~/.cache", writable=False)
    if folder is None:
        return Cache(OFF)
    try:
        sizes = [path.stat().st_size for path in folder.glob("*-cache")]
        exists, nearest = folder.is_dir(), _existing(folder)
    except OSError:
        return Cache(str(folder), writable=False)
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return Cache(str(folder), exists, writable, len(sizes), sum(sizes))


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next((p for p in (path, *path.parents) if p.exists()), path)
