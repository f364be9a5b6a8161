"""Devices that a plan can be made for without having one, and how several of them are connected.

All rates are the makers' figures, which no program reaches: times derived from them are bounds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from glm2_jax.errors import UsageError

_GIB, _GB, _MIB = 2**30, 10**9, 2**20


@dataclass(frozen=True)
class Card:
    """A device as it is sold."""

    name: str
    platform: str  # "gpu" or "tpu"
    memory: int  # bytes
    bandwidth: float  # memory bandwidth, bytes per second
    kinds: tuple[str, ...]  # parts of jax's or nvidia-smi's name for it; all must be there
    topology: str | None = None  # libtpu's name for compiling without the chip
    # Dense 16-bit operations per second of matrix products, summed in float32; None = unpublished.
    flops: float | None = None

    @property
    def half(self) -> str:
        """Its 16-bit type: the older ones lack bfloat16."""
        return "float16" if self.name in ("t4", "v100") else "bfloat16"


# NVIDIA often quotes operations with sparsity, which is twice what is here. GPU memories are sold
# in units of 1024^3 bytes and reported as such by nvidia-smi, less where the card keeps some.
CARDS = {
    card.name: card
    for card in (
        # NVIDIA: as the makers' specifications are commonly quoted; T4 and A100 40 GB looked up.
        # Operations: of GeForce cards from the architectures' whitepapers (tensor cores, sums in
        # float32), unknown for 3060 and 4060; of the others from their data sheets. Both figures
        # of V100, A100 80 GB, H100 and H200 are those of the SXM form.
        Card("3060", "gpu", 12 * _GIB, 360e9, ("rtx 3060",)),
        Card("3080", "gpu", 10 * _GIB, 760e9, ("rtx 3080",), flops=59.5e12),
        Card("3090", "gpu", 24 * _GIB, 936e9, ("rtx 3090",), flops=71e12),
        Card("4060", "gpu", 8 * _GIB, 272e9, ("rtx 4060",)),
        Card("4090", "gpu", 24 * _GIB, 1008e9, ("rtx 4090",), flops=165.2e12),
        Card("5090", "gpu", 32 * _GIB, 1792e9, ("rtx 5090",), flops=209.5e12),
        # 16 GB less its error correction
        Card("t4", "gpu", 15 * _GIB, 320e9, ("tesla t4",), flops=65e12),
        Card("a10", "gpu", 24 * _GIB, 600e9, ("a10",), flops=125e12),
        Card("l4", "gpu", 24 * _GIB, 300e9, ("l4",), flops=121e12),
        Card("l40s", "gpu", 48 * _GIB, 864e9, ("l40s",), flops=362e12),
        Card("v100", "gpu", 16 * _GIB, 900e9, ("v100", "16gb"), flops=125e12),
        Card("a100", "gpu", 40 * _GIB, 1555e9, ("a100", "40gb"), flops=312e12),
        Card("a100-80", "gpu", 80 * _GIB, 2039e9, ("a100", "80gb"), flops=312e12),  # PCIe: 1935
        Card("h100", "gpu", 80 * _GIB, 3350e9, ("h100", "80gb"), flops=989e12),  # PCIe: 2000
        Card("h200", "gpu", 143771 * _MIB, 4800e9, ("h200",), flops=989e12),  # 141 GB
        # Google: one chip; v5e and v5p looked up at cloud.google.com/tpu/docs, v6e as quoted, and
        # the operations of all three ("peak compute per chip (bf16)") there, too. Of the 16 GB of a
        # v5e the compiler leaves 15.75 GiB to programs (its out-of-memory message).
        Card("v5e-1", "tpu", int(15.75 * _GIB), 819e9, ("tpu v5 lite",), "v5e:1x1", 197e12),
        Card("v5p", "tpu", 95 * _GB, 2765e9, ("tpu v5",), "v5p:1x1x1", 459e12),
        Card("v6e-1", "tpu", 32 * _GB, 1640e9, ("tpu v6 lite",), "v6e:1x1", 918e12),
    )
}


def find_card(kind: str) -> Card | None:
    """Return the card that jax or nvidia-smi calls `kind` ("TPU v5 lite"), by the most specific
    name; None = none."""
    words = kind.lower().replace("-", " ").split()
    text = f" {' '.join(words)} "
    if " ti " in text or " super " in text:  # other memories than the plain ones
        return None
    fitting = [c for c in CARDS.values() if all(f" {part} " in text for part in c.kinds)]
    return max(fitting, key=lambda card: len("".join(card.kinds)), default=None)


@dataclass(frozen=True)
class Links:
    """Devices of one kind, and what connects them."""

    name: str
    card: Card
    flops: float  # dense 16-bit operations per second
    link: float  # bytes per second of one link, each direction counted alone
    ring: int  # links of a device that a ring through its neighbors uses to send
    both_ways: bool  # whether the ring runs in both directions, over half of these links each
    joined: int  # devices that have such links to each other; the network connects more
    network: float  # bytes per second that a device can send over the network
    start: float  # latency in seconds before the first byte moves
    hop: float  # seconds of each step of a ring, for any size
    network_hop: float


LINKS: Mapping[str, Links] = {
    links.name: links
    for links in (
        # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 4 ports, 400 GB/s of both directions and
        # all ports (1600 Gbit/s in one), pods of 256 chips, 6.4 Tbit/s of network for a pod.
        # A hop of "around 1us": jax-ml.github.io/scaling-book/sharding. Latencies of the network
        # between pods are not published, and not counted.
        Links(
            "v5e", CARDS["v5e-1"], 197e12,
            link=50e9, ring=2, both_ways=True, joined=256, network=6.4e12 / 8 / 256,
            start=0, hop=1e-6, network_hop=0,
        ),
        # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 4800 Gbit/s in one direction over 6 ports,
        # pods of 8960 chips (a job gets 6144 at most), 50 Gbit/s of network for a chip.
        Links(
            "v5p", CARDS["v5p"], 459e12,
            link=100e9, ring=2, both_ways=True, joined=6144, network=50e9 / 8,
            start=0, hop=1e-6, network_hop=0,
        ),
        # As the maker's figures are commonly quoted (SXM): 1979 TFLOPS "with sparsity", half of it
        # without; NVLink 900 GB/s of both directions, in 18 links; DGX H200: 8 GPUs, for each a
        # ConnectX-7 of 400 Gbit/s. Seconds: NCCL's own model of rings (nccl/src/graph/tuning.cc).
        Links(
            "h200", CARDS["h200"], 989.5e12,
            link=25e9, ring=18, both_ways=False, joined=8, network=400e9 / 8,
            start=6.6e-6, hop=0.6e-6, network_hop=2.7e-6,
        ),
    )
}  # fmt: skip

# One device, or several: "v5e-8", "8xh200".
MESHES = rf"(?:(\d{{1,6}})x)?({'|'.join(LINKS)})(?:-(\d{{1,6}}))?"


def find_links(name: str, devices: int) -> Links:
    """Return the devices of a name like "v5p", "v5e-8" or "8xh200"; raise UsageError for another
    name, or a number that is not `devices`."""
    match = re.fullmatch(MESHES, name)
    if match is None:
        raise UsageError(
            f"{name}: the links of this device are not known.",
            f"Known are {', '.join(LINKS)}.",
            "Write, for example, v5e-8, v5p-8 or 8xh200.",
        )
    count = match[1] or match[3]
    if count is not None and int(count) != devices:
        raise UsageError(
            f"{name} has {int(count)} devices, but the mesh needs {devices}.",
            fix=f"Use {match[2]}-{devices}, or a mesh that multiplies to {int(count)}.",
        )
    return LINKS[match[2]]
