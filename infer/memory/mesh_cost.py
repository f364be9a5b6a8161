"""What a mesh costs: bytes on a device and through its links, and lower bounds of step times.

All is arithmetic over the shapes that `glm2_jax.sharding` gives a device, at the makers' rates of
`infer.memory.links`. Axis letters as in `glm2_jax.model`; here b are the rows of one device.

Collectives of a step, as compiled programs have them (docs/sharding.md):
  tensor: an all-reduce of [b, T, D] after attention and MLP of each layer and after the embedding,
    and an all-gather of the logits that are drawn from. In the backward pass as many again; if
    blocks are recomputed, one more per layer.
  fsdp: an all-gather of every matrix before it is used; in training once more before the backward
    pass, and a reduce-scatter of its gradient, which is float32 there.
  data: in training an all-reduce of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from glm2_jax.cli.messages import human_size
from glm2_jax.config import GLMConfig
from glm2_jax.mesh import all_axes, mesh_text
from glm2_jax.schemes import COLUMN_AXES, EMBEDDINGS
from glm2_jax.sharding import check_mesh
from infer.memory.links import Links, Talk, all_reduce, gather
from infer.memory.precision import Precision
from infer.memory.shares import Sizes, cache_share, device_params, sizes_of, total_bytes

_FLOAT32 = 4
_ADAM = 4 * _FLOAT32  # per trained parameter: itself, its gradient, two moments
_ADAM_MOVED = 7 * _FLOAT32  # in an update: these are read, all but the gradient are written


@dataclass(frozen=True)
class Step:
    """A step on one device, and lower bounds of its times.

    Attributes:
        name: "decode", "prefill", "lora" or "full".
        tokens: of all devices together.
        memory_s: moving weights, cache and optimizer state through memory once; no activations.
        products_s: operations of matrix products and attention.
        talk: with other devices.
        memory_fixed_s, links_fixed_s: the parts of these times that do not grow with the batch.
    """

    name: str
    tokens: int
    memory_s: float
    products_s: float
    talk: Talk
    memory_fixed_s: float
    links_fixed_s: float

    @property
    def limit(self) -> str:
        """What takes longest."""
        times = {
            "memory": self.memory_s,
            "products": self.products_s,
            "links": self.talk.seconds,
        }
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
    """What a model on a mesh costs each device.

    Attributes:
        sizes: axis -> size. batch: rows of all devices, of `length` tokens each.
        weights, cache: bytes.
        adapted, trained: bytes in LoRA (only the base: adapters are small) and in full training
            with Adam (float32 parameters, gradients and moments, and the copy that is computed
            with), without activations.
        steps: by name.
    """

    links: Links
    sizes: Mapping[str, int]
    precision: Precision
    batch: int
    length: int
    weights: int
    cache: int
    adapted: int
    trained: int
    steps: Mapping[str, Step]

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())


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
    """Return what a model on a mesh costs.

    Args:
        config: the model.
        sizes: axis -> size, as `glm2_jax.parse_mesh` returns it.
        card: one of `infer.memory.links.LINKS`.
        batch: rows of all devices together; filled up to what `data` and `fsdp` divide.
        length: tokens in the cache of each row, of a prompt, and of a row in training.
        dtype: of activations and cache, and of weights that are not quantized.
        scheme: of `glm2_jax.schemes`, for the matrices in inference and LoRA.

    Raises:
        UsageError: a mesh that does not fit the model.
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
    return MeshCost(card, sizes, precision, batch, length, weights, cache, weights, trained, steps)


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
    L, plain, computed = config.num_layers, Precision(precision.dtype), _gathered(sizes)
    shapes = device_params(config, plain, computed)
    matrices = sum(math.prod(shapes["layers"][name].shape) for name in COLUMN_AXES)
    head, heads = math.prod(shapes["head"].shape), config.num_heads // sizes["tensor"]
    params = device_params(config, precision, computed)
    read = total_bytes(params) - total_bytes(params["embed"])  # of which a step needs a few rows
    stored = total_bytes(device_params(config, plain, sizes_of(sizes)))
    tokens, triangle = here * length, here * length * (length + 1) / 2

    def operations(tokens: int, drawn: int, pairs: float) -> float:
        attention = 4 * L * heads * config.head_dim * pairs
        return 2 * matrices * tokens + 2 * head * drawn + attention

    def reduced(tokens: int) -> Talk:
        return all_reduce(links, sizes, "tensor", tokens * config.hidden_size * precision.size)

    def infer(name: str, tokens: int, pairs: float) -> Step:
        def growing(tokens: int) -> Talk:
            logits = min(here, tokens) * config.vocab_size * _FLOAT32
            return reduced(tokens) * (2 * L + 1) + gather(links, sizes, "tensor", logits)

        work, fixed = operations(tokens, here, pairs), _weights(config, precision, sizes, links)
        return _step(links, sizes, name, tokens, (read, cache), work, fixed, growing)

    def train(name: str, moved: float, reductions: int, fixed: Talk) -> Step:
        def growing(tokens: int) -> Talk:
            return reduced(tokens) * reductions

        work = 3 * operations(tokens, tokens, triangle)
        return _step(links, sizes, name, tokens, (moved, 0), work, fixed, growing)

    lora = _weights(config, precision, sizes, links) * 2
    full = _weights(config, plain, sizes, links) * 2
    full += _weights(config, Precision("float32"), sizes, links)
    full += all_reduce(links, sizes, "data", stored)
    updated = stored // plain.size * (_ADAM_MOVED + 3 * plain.size)
    steps = (
        infer("decode", here, tokens),
        infer("prefill", tokens, triangle),
        # Forward, again inside each block, and backward through the activations.
        train("lora", 3 * read, 5 * L + 2, lora),
        # Forward, and backward through activations and weights.
        train("full", updated, 4 * L + 2, full),
    )
    return {step.name: step for step in steps}


def _gathered(sizes: Mapping[str, int]) -> Sizes:
    """Return the mesh that computes: what `data` and `fsdp` cut is gathered before a product."""
    return sizes_of({**sizes, "data": 1, "fsdp": 1})


def _weights(
    config: GLMConfig, precision: Precision, sizes: Mapping[str, int], links: Links
) -> Talk:
    """Return what gathering every matrix once over fsdp takes."""
    params, total = device_params(config, precision, _gathered(sizes)), Talk()
    layers = params["layers"], COLUMN_AXES, config.num_layers
    for tree, names, times in (layers, (params, EMBEDDINGS, 1)):
        for name in names:
            one = gather(links, sizes, "fsdp", total_bytes(tree[name]) / times)
            total += one * times
    return total


def _step(
    links: Links,
    sizes: Mapping[str, int],
    name: str,
    tokens: int,
    moved: tuple[float, int],
    operations: float,
    fixed: Talk,
    growing: Callable[[int], Talk],
) -> Step:
    """Return a step of `tokens` on this device that moves weights or state, and a cache."""
    return Step(
        name,
        tokens * sizes["data"] * sizes["fsdp"],
        sum(moved) / links.card.bandwidth,
        operations / links.flops,
        fixed + growing(tokens),
        moved[0] / links.card.bandwidth,
        fixed.seconds + growing(0).seconds,  # the hops of rings, for an empty message
    )


def report(cost: MeshCost) -> list[str]:
    """Return the costs in lines, for people."""
    links, card = cost.links, cost.links.card

    def shown(size: int) -> str:
        return human_size(size) + ("" if size < card.memory else " (too much)")

    held = cost.weights + cost.cache
    lines = [
        f"mesh {mesh_text(cost.sizes)} of {cost.devices} x {links.name}: {cost.precision.name}, "
        f"{cost.batch:,} x {cost.length:,} tokens",
        f"each device ({human_size(card.memory)}, {card.bandwidth / 1e9:,.0f} GB/s, "
        f"{links.flops / 1e12:,.0f} TFLOP/s, {links.link * links.ring / 1e9:,.0f} GB/s around a "
        f"ring, {links.network / 1e9:,.1f} GB/s of network):",
        f"  weights {human_size(cost.weights)}, cache {human_size(cost.cache)}, without activations"
        + ("" if held < card.memory else " (too much)"),
        f"  in training without activations: LoRA {shown(cost.adapted)}, all parameters "
        f"{shown(cost.trained)}",
        "lower bounds of step times, at the makers' rates:",
    ]
    for step in cost.steps.values():
        talk, needed = step.talk, step.tokens_needed
        sent = human_size(round(talk.link_bytes))
        per_link = human_size(round(talk.link_bytes / links.ring))
        lines += [
            f"  {step.name}: memory {_time(step.memory_s)}, products {_time(step.products_s)}, "
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
