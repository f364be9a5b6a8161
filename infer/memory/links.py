"""How devices are connected, and the minimum time of a collective over them.

The figures are the makers', each direction of a link counted alone. No program reaches them: times
derived from them are bounds.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass

from glm2_jax.errors import UsageError
from infer.memory.cards import CARDS, Card


@dataclass(frozen=True)
class Links:
    """Devices of one kind, and what connects them."""

    name: str
    card: Card
    flops: float  # dense 16-bit operations per second
    link: float  # bytes per second of one link in one direction
    ring: int  # links of a device that a ring through its neighbors uses to send
    both_ways: bool  # whether the ring runs in both directions, over half of these links each
    joined: int  # devices that have such links to each other; the network connects more
    network: float  # bytes per second that a device can send over the network
    start: float  # latency in seconds before the first byte moves
    hop: float  # seconds of each step of a ring, for any size
    network_hop: float

    def steps(self, devices: int) -> int:
        """Return the steps of a ring until every device has everything."""
        return devices // 2 if self.both_ways else devices - 1

    def rate(self, devices: int) -> float:
        """Return the bytes per second that a device sends in a ring; two devices share one link."""
        return self.link * (min(self.ring, devices - 1) if self.both_ways else self.ring)


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
    """Return the devices of a name like "v5e-8", "8xh200" or "v5p".

    Args:
        name: may contain a number of devices.
        devices: of the mesh, which must be that number.

    Raises:
        UsageError: no such name, or another number.
    """
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


@dataclass(frozen=True)
class Talk:
    """What a device sends to others in a step, and the least time of it."""

    calls: int = 0  # collectives
    link_bytes: float = 0  # through its links of a ring, all together
    network_bytes: float = 0
    seconds: float = 0  # at the makers' rates, steps of the rings included

    def __add__(self, other: Talk) -> Talk:
        return Talk(*map(operator.add, astuple(self), astuple(other)))

    def __mul__(self, times: int) -> Talk:
        return Talk(*(part * times for part in astuple(self)))


def gather(links: Links, sizes: Mapping[str, int], axis: str, size: float) -> Talk:
    """Return the cost of an all-gather along an axis of a mesh; a reduce-scatter costs the same.

    Of n devices in a ring each sends the n-th part of the array n - 1 times. Where the axis reaches
    beyond the devices that are linked, each of them first exchanges its part over the network, and
    then sends what it received around its ring.

    Args:
        sizes: axis -> size, the slowest first: devices next to each other differ in the last axis.
        size: bytes that every device has in the end.
    """
    inside, outside = _reach(links, sizes, axis)
    if inside * outside == 1:
        return Talk()
    link_bytes = (inside - 1) / inside * size
    network_bytes = (outside - 1) / outside * size / inside
    seconds = links.start + network_bytes / links.network + (outside - 1) * links.network_hop
    if inside > 1:
        seconds += link_bytes / links.rate(inside) + links.steps(inside) * links.hop
    return Talk(1, link_bytes, network_bytes, seconds)


def all_reduce(links: Links, sizes: Mapping[str, int], axis: str, size: float) -> Talk:
    """Return the cost of an all-reduce of `size` bytes: reduce-scatter and all-gather, one call."""
    half = gather(links, sizes, axis, size)
    seconds = 2 * half.seconds - (links.start if half.calls else 0)
    return Talk(half.calls, 2 * half.link_bytes, 2 * half.network_bytes, seconds)


def _reach(links: Links, sizes: Mapping[str, int], axis: str) -> tuple[int, int]:
    """Return how many devices along an axis are linked, and how many such groups there are."""
    names = list(sizes)
    apart = 1  # places between neighbors along the axis
    for name in names[names.index(axis) + 1 :]:
        apart *= sizes[name]
    inside = max(1, min(sizes[axis], links.joined // apart))
    while sizes[axis] % inside:
        inside -= 1
    return inside, sizes[axis] // inside
