"""What a mesh costs: bytes on a device and through its links, and lower bounds of step times.

All is arithmetic over the shapes that `glm2_jax.sharding` gives a device, at the makers' rates of
`infer.memory.cards`. Axis letters as in `glm2_jax.model`; here b are the rows of one device.

Collectives of a step, as compiled programs have them (docs/scale/meshes.md):
  tensor: an all-reduce of [b, T, D] after attention and MLP of each layer and after the embedding,
    and an all-gather of the logits that are drawn from. In the backward pass as many again; if
    blocks are recomputed, one more per layer.
  fsdp: an all-gather of every matrix before it is used; in training once more before the backward
    pass, and a reduce-scatter of its gradient, which is float32 there.
  data: in training an all-reduce of the gradients.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import astuple, dataclass

from glm2_jax.cli.messages import human_size
from glm2_jax.config import GLMConfig
from glm2_jax.mesh import all_axes, mesh_text
from glm2_jax.parts import parts_of, tables_of
from glm2_jax.schemes import COLUMN_AXES
from glm2_jax.sharding import check_mesh
from infer.memory.cards import Links
from infer.memory.precision import Precision
from infer.memory.shares import cache_share, computed_params, device_params, sizes_of, total_bytes

_FLOAT32 = 4
_ADAM = 4 * _FLOAT32  # per trained parameter: itself, its gradient, two moments
_ADAM_MOVED = 7 * _FLOAT32  # in an update: these are read, all but the gradient are written


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
    then sends what it received around its ring. Every device has `size` bytes in the end. Devices
    next to each other differ in the last axis of `sizes`.
    """
    names = list(sizes)
    apart = math.prod(sizes[name] for name in names[names.index(axis) + 1 :])
    inside = max(1, min(sizes[axis], links.joined // apart))  # devices along it that are linked
    while sizes[axis] % inside:
        inside -= 1
    outside = sizes[axis] // inside
    if sizes[axis] == 1:
        return Talk()
    link_bytes = (inside - 1) / inside * size
    network_bytes = (outside - 1) / outside * size / inside
    seconds = links.start + network_bytes / links.network + (outside - 1) * links.network_hop
    if inside > 1:  # two devices share one link, and a ring in both directions has half the steps
        used = min(links.ring, inside - 1) if links.both_ways else links.ring
        steps = inside // 2 if links.both_ways else inside - 1
        seconds += link_bytes / (links.link * used) + steps * links.hop
    return Talk(1, link_bytes, network_bytes, seconds)


def all_reduce(links: Links, sizes: Mapping[str, int], axis: str, size: float) -> Talk:
    """Return the cost of an all-reduce of `size` bytes: reduce-scatter and all-gather, one call."""
    half = gather(links, sizes, axis, size)
    seconds = 2 * half.seconds - (links.start if half.calls else 0)
    return Talk(half.calls, 2 * half.link_bytes, 2 * half.network_bytes, seconds)


@dataclass(frozen=True)
class Step:
    """A step on one device, and lower bounds of its times."""

    tokens: int  # of all devices together
    memory_s: float  # moving weights, cache and optimizer state through memory; no activations
    products_s: float  # operations of matrix products and attention
    talk: Talk  # with other devices
    memory_fixed_s: float  # what does not grow with the batch, of the memory's time
    links_fixed_s: float  # and of the links'

    @property
    def limit(self) -> str:
        """What takes longest."""
        times = {"memory": self.memory_s, "products": self.products_s, "links": self.talk.seconds}
        return max(times, key=lambda name: times[name])

    @property
    def overlapped_s(self) -> float:
        """The time if links, memory and products work at once."""
        return max(self.memory_s, self.products_s, self.talk.seconds)

    @property
    def serial_s(self) -> float:
        """The time if nothing is computed while devices talk."""
        return max(self.memory_s, self.products_s) + self.talk.seconds

    @property
    def tokens_needed(self) -> int | None:
        """Tokens per step from which it is compute-bound; None if memory or links grow faster."""
        needed = 0.0
        for total, fixed in (
            (self.memory_s, self.memory_fixed_s),
            (self.talk.seconds, self.links_fixed_s),
        ):
            spare = self.products_s - (total - fixed)  # the gain of a larger batch
            if spare <= 0:
                return None
            needed = max(needed, fixed / spare * self.tokens)
        return math.ceil(needed)


@dataclass(frozen=True)
class MeshCost:
    """What a model on a mesh costs each device; sizes in bytes, in training without activations."""

    links: Links
    sizes: Mapping[str, int]  # axis -> size
    precision: Precision
    batch: int  # rows of all devices
    length: int  # tokens of each
    weights: int  # in LoRA, too: adapters are small
    cache: int
    trained: int  # with Adam: float32 parameters, gradients, moments, and the copy that computes
    steps: Mapping[str, Step]  # "decode", "prefill", "lora", "full"


def mesh_cost(
    config: GLMConfig,
    sizes: Mapping[str, int],
    card: Links,
    *,
    batch: int,
    length: int,
    dtype: str = "bfloat16",
    scheme: str | None = None,
) -> MeshCost:
    """Return what a model costs on a mesh with the `sizes` of `glm2_jax.parse_mesh`; raises
    UsageError for a mesh that does not fit it.

    `batch` rows of all devices are filled up to what `data` and `fsdp` divide; each has `length`
    tokens in the cache, as a prompt, and in training. `scheme` is that of the matrices in inference
    and LoRA, `dtype` that of all else.
    """
    sizes = all_axes(sizes)
    precision, mesh = Precision(dtype, scheme), sizes_of(sizes)
    check_mesh(config, sizes, precision.scheme)
    copies = sizes["data"] * sizes["fsdp"]
    here = -(-batch // copies)
    elements = total_bytes(device_params(config, Precision("float32"), mesh)) // _FLOAT32
    weights = total_bytes(device_params(config, precision, mesh))
    cache = cache_share(config, precision.size, length, here * copies, mesh)
    trained = elements * (_ADAM + precision.size)
    steps = _steps(config, sizes, card, precision, here, length, cache)
    return MeshCost(card, sizes, precision, batch, length, weights, cache, trained, steps)


def _steps(
    config: GLMConfig,
    sizes: Mapping[str, int],
    links: Links,
    precision: Precision,
    here: int,
    length: int,
    cache: int,
) -> dict[str, Step]:
    """Return the steps of a device with `here` rows of `length` tokens, by name."""
    L, plain, mesh = config.num_layers, Precision(precision.dtype), sizes_of(sizes)
    shapes, params = (computed_params(config, form, mesh) for form in (plain, precision))
    matrices = sum(math.prod(shapes["layers"][name].shape) for name in COLUMN_AXES)
    head, heads = math.prod(shapes[config.block.head].shape), config.num_heads // sizes["tensor"]
    tables = sum(total_bytes(params[name]) for name in tables_of(config))
    read = total_bytes(params) - tables  # of which a step needs a few rows
    stored = total_bytes(device_params(config, plain, mesh))
    tokens, triangle = here * length, here * length * (length + 1) / 2
    bandwidth = links.card.bandwidth

    def operations(tokens: int, drawn: int, pairs: float) -> float:
        attention = 4 * L * heads * config.head_dim * pairs
        return 2 * matrices * tokens + 2 * head * drawn + attention

    def step(
        tokens: int, moved: float, work: float, fixed: Talk, reductions: int, cache: int = 0
    ) -> Step:
        """A step with so many all-reduces of its activations, that moves weights or state, and if
        it infers, a cache."""

        def talk(tokens: int) -> Talk:
            size = tokens * config.hidden_size * precision.size
            found = fixed + all_reduce(links, sizes, "tensor", size) * reductions
            logits = min(here, tokens) * config.vocab_size * _FLOAT32
            return found + gather(links, sizes, "tensor", logits) if cache else found

        return Step(
            tokens * sizes["data"] * sizes["fsdp"],
            (moved + cache) / bandwidth,
            work / links.flops,
            talk(tokens),
            moved / bandwidth,
            talk(0).seconds,  # the hops of rings, for an empty message
        )

    gathered = _gathered_weights(config, precision, sizes, links)
    full = _gathered_weights(config, plain, sizes, links) * 2
    full += _gathered_weights(config, Precision("float32"), sizes, links)
    full += all_reduce(links, sizes, "data", stored)
    updated = stored // plain.size * (_ADAM_MOVED + 3 * plain.size)
    training = 3 * operations(tokens, tokens, triangle)
    decoding, prefill = operations(here, here, tokens), operations(tokens, here, triangle)
    return {
        "decode": step(here, read, decoding, gathered, 2 * L + 1, cache),
        "prefill": step(tokens, read, prefill, gathered, 2 * L + 1, cache),
        # Forward, again inside each block, and backward through the activations.
        "lora": step(tokens, 3 * read, training, gathered * 2, 5 * L + 2),
        # Forward, and backward through activations and weights.
        "full": step(tokens, updated, training, full, 4 * L + 2),
    }


def _gathered_weights(
    config: GLMConfig, precision: Precision, sizes: Mapping[str, int], links: Links
) -> Talk:
    """Return what gathering every matrix once over fsdp takes."""
    params, total = computed_params(config, precision, sizes_of(sizes)), Talk()
    for part in parts_of(config):
        if part.axes != "D" and "D" in part.axes:
            tree, times = (params["layers"], config.num_layers) if part.in_layers else (params, 1)
            one = gather(links, sizes, "fsdp", total_bytes(tree[part.name]) / times)
            total += one * times
    return total


def report(cost: MeshCost) -> list[str]:
    """Return the costs in lines, for people."""
    links, card = cost.links, cost.links.card

    def much(size: int) -> str:
        return "" if size < card.memory else " (too much)"

    weights, cache = human_size(cost.weights), human_size(cost.cache)
    devices = math.prod(cost.sizes.values())
    lines = [
        f"mesh {mesh_text(cost.sizes)} of {devices} x {links.name}: {cost.precision.name}, "
        f"{cost.batch:,} x {cost.length:,} tokens",
        f"each device ({human_size(card.memory)}, {card.bandwidth / 1e9:,.0f} GB/s, "
        f"{links.flops / 1e12:,.0f} TFLOP/s, {links.link * links.ring / 1e9:,.0f} GB/s around a "
        f"ring, {links.network / 1e9:,.1f} GB/s of network):",
        f"  weights {weights}, cache {cache}, without activations{much(cost.weights + cost.cache)}",
        f"  in training without activations: LoRA {weights}{much(cost.weights)}, "
        f"all parameters {human_size(cost.trained)}{much(cost.trained)}",
        "lower bounds of step times, at the makers' rates:",
    ]
    for name, step in cost.steps.items():
        talk, needed = step.talk, step.tokens_needed
        sent = human_size(round(talk.link_bytes))
        per_link = human_size(round(talk.link_bytes / links.ring))
        lines += [
            f"  {name}: memory {_time(step.memory_s)}, products {_time(step.products_s)}, "
            f"links {_time(talk.seconds)}: limited by {step.limit}, at most "
            f"{step.tokens / step.overlapped_s:,.0f} tokens/s",
            f"    {talk.calls} collectives; a device sends {sent} through {links.ring} links "
            f"({per_link} each) and {human_size(round(talk.network_bytes))} through the network",
            "    not compute-bound at any batch size"
            if needed is None
            else f"    compute-bound from {needed:,} tokens per step",
        ]
    return lines


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
