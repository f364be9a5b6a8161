"""The facts about a machine that matter here; `probing` collects them, the doctor judges them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from glm2_jax.runtime.compile_cache import OFF
from glm2_jax.runtime.host_memory import Memory


@dataclass(frozen=True)
class Device:
    """A device that jax found; `memory` is what jax may use, in bytes, if known."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str
    memory: int | None = None
    capability: str = ""  # of NVIDIA GPUs, e.g. "9.0"


@dataclass(frozen=True)
class JaxProbe:
    """What jax did in a separate process.

    Attributes:
        devices: empty if jax does not work.
        error: one line; "" if jax works.
        said: the important lines of its standard error.
    """

    devices: tuple[Device, ...] = ()
    error: str = ""
    said: tuple[str, ...] = ()

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
    """Signs of NVIDIA GPUs.

    Attributes:
        on_bus: GPUs on the PCI bus.
        nodes: device files of GPUs, /dev/nvidia0 or /dev/dxg.
        driver: version of the kernel driver, "" if it is not loaded.
        gpus: what nvidia-smi lists.
        smi_error: why nvidia-smi gave no list; "" if it did, or is not installed.
    """

    on_bus: int = 0
    nodes: int = 0
    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    smi_error: str = ""

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
    """Everything that the doctor judges.

    Attributes:
        packages: name -> version of those that are installed.
        variables: environment variables that are set and change what jax does.
        avx: whether the processor has it; None = unknown.
        jax_on_cpu: a second attempt without accelerators if the first failed.
    """

    system: str = "Linux"
    arch: str = "x86_64"
    python: str = "3.11"
    container: bool = False
    packages: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    avx: bool | None = None
    jax: JaxProbe = JaxProbe()
    jax_on_cpu: JaxProbe | None = None
    nvidia: Nvidia = Nvidia()
    tpus: int = 0
    memory: Memory = Memory()
    disks: tuple[Disk, ...] = ()
    cache: Cache = Cache(OFF)
