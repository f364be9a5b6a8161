"""What a machine has, as far as it matters here: plain facts, gathered by `probing`.

The doctor judges nothing else, so that tests make up machines as they like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from glm2_jax.runtime.compile_cache import OFF
from glm2_jax.runtime.host_memory import Memory


@dataclass(frozen=True)
class Device:
    """A device that jax found; `memory` is what jax may use, bytes, where it tells."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str
    memory: int | None = None
    capability: str = ""  # of NVIDIA GPUs, e.g. "9.0"


@dataclass(frozen=True)
class JaxProbe:
    """What became of jax in a process of its own.

    Attributes:
      devices: none where jax does not work.
      error: one line; "" where jax works.
      said: what it wrote on standard error, the telling lines.
    """

    devices: tuple[Device, ...] = ()
    error: str = ""
    said: tuple[str, ...] = ()

    @property
    def works(self) -> bool:
        return not self.error


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as nvidia-smi tells it; bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Nvidia:
    """Signs of NVIDIA GPUs.

    Attributes:
      on_bus: GPUs on the PCI bus.
      nodes: device files of GPUs, /dev/nvidia0 or /dev/dxg.
      driver: version of the kernel driver, "" where it is not loaded.
      gpus: what nvidia-smi lists.
      smi_error: why nvidia-smi gave no list; "" where it did, or is not installed.
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
    """Free bytes where something is kept; None where the folder cannot be asked."""

    purpose: str
    folder: str
    free: int | None


@dataclass(frozen=True)
class Cache:
    """The folder of compiled programs; `folder` is "off" where there is to be none."""

    folder: str
    exists: bool = False
    writable: bool = True
    programs: int = 0
    size: int = 0


@dataclass(frozen=True)
class Machine:
    """Everything that the doctor judges.

    Attributes:
      packages: name -> version, of those that are installed.
      variables: environment variables that change what jax does, where set.
      avx: whether the processor has it; None where unknown or meaningless.
      jax_on_cpu: a second try without accelerators, where the first failed.
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
