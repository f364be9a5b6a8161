"""What a mesh costs: bytes on a device and through its links, and the times that steps cannot beat.

All is arithmetic over the shapes that `glm2_jax.sharding` gives a device, at the makers' rates of
`infer.memory.links`. Axis letters as in `glm2_jax.model`; here b are the rows of one device.

Collectives of a step, as compiled programs have them (docs/sharding.md):
  tensor: an all-reduce of [b, T, D] behind attention and MLP of each layer and behind the
    embedding, and an all-gather of the logits that are drawn from. In the backward pass as many
    again; where blocks are computed again, one more a layer.
  fsdp: an all-gather of every matrix before it is used; in training before the backward pass once
    more, and a reduce-scatter of its gradient, which is float32 there.
  data: in training an all-reduce of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm2_jax.cli.messages import human_size
from glm2_jax.config import GLMConfig
from glm2_jax.mesh import AXES, mesh_text
from glm2_jax.schemes import COLUMN_AXES, EMBEDDINGS
from glm2_jax.sharding import check_mesh
from infer.memory.links import Links, Talk, all_reduce, gather
from infer.memory.precision import Precision
from infer.memory.shares import cache_share, device_params, sizes_of, total_bytes

_FLOAT32 = 4
_ADAM = 4 * _FLOAT32  # of a trained parameter: itself, its gradient, two moments
_ADAM_MOVED = 7 * _FLOAT32  # in an update: these are read, all but the gradient are written


@dataclass(frozen=True)
class Step:
    """A step on one device, and the times of what it has to do; each is a bound.

    Attributes:
      name: "decode", "prefill", "lora" or "full".
      tokens: that all devices together read in it.
      memory_s: moving weights, cache and optimizer state through memory once; no activations.
      products_s: operations of matrix products and attention.
      talk: with other devices.
      memory_fixed_s, links_fixed_s: what of these times does not grow with the batch.
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
        """If links, memory and products all work at once."""
        return max(self.memory_s, self.products_s, self.talk.seconds)

    @property
    def serial_s(self) -> float:
        """If nothing is computed while devices talk."""
        return max(self.memory_s, self.products_s) + self.talk.seconds

    @property
    def tokens_needed(self) -> int | None:
        """In a step, for products to take longest; None if no batch is large enough: the time of
        memory or links then grows with it as fast as theirs."""
        needed = 0.0
        for total, fixed in (
            (self.memory_s, self.memory_fixed_s),
            (self.talk.seconds, self.links_fixed_s),
        ):
            spare = self.products_s - (total - fixed)  # what the batch gains on it
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
      adapted, trained: bytes in LoRA (the base alone: adapters are small) and in full training
        with Adam (float32 parameters, gradients and moments, and the copy that is computed with),
        without activations.
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
    """What a model on a mesh costs.

    Args:
      sizes: axis -> size, as `glm2_jax.parse_mesh` gives it.
      card: of `infer.memory.links.LINKS`.
      batch: rows of all devices together; filled up to what `data` and `fsdp` divide.
      length: tokens in the cache of each row, of a prompt, and of a row that is trained on.
      dtype: of activations and cache, and of weights that are not quantized.
      scheme: of `glm2_jax.schemes`, by which matrices are quantized in inference and LoRA.

    Raises:
      UsageError: a mesh that does not fit the model.
    """
    sizes = {**sizes, **{axis: 1 for axis in AXES if axis not in sizes}}
    precision = Precision(dtype, scheme)
    check_mesh(config, sizes, precision.scheme)
    here = -(-batch // (sizes["data"] * sizes["fsdp"]))
    made = _Steps(config, sizes, card, precision, here, length)
    elements = total_bytes(device_params(config, Precision("float32"), sizes_of(sizes))) // _FLOAT32
    weights = total_bytes(made.params)
    return MeshCost(
        card,
        sizes,
        precision,
        batch,
        length,
        weights,
        made.cache,
        weights,
        elements * (_ADAM + Precision(dtype).size),
        {step.name: step for step in (made.decode(), made.prefill(), made.lora(), made.full())},
    )


def _cut(params: Any) -> dict[str, Any]:
    """The parameters that `fsdp` cuts."""
    layers = {name: params["layers"][name] for name in COLUMN_AXES}
    return {**layers, **{name: params[name] for name in EMBEDDINGS}}


class _Steps:
    """The steps of one device: b rows of `length` tokens."""

    def __init__(
        self,
        config: GLMConfig,
        sizes: Mapping[str, int],
        links: Links,
        precision: Precision,
        here: int,
        length: int,
    ):
        self.config, self.sizes, self.links, self.precision = config, sizes, links, precision
        self.here, self.length = here, length
        whole = {**sizes, "data": 1, "fsdp": 1}  # what computes: fsdp is gathered first
        plain = Precision(precision.dtype)
        self.params = device_params(config, precision, sizes_of(sizes))
        self.gathered = device_params(config, precision, sizes_of(whole))
        self.plain = device_params(config, plain, sizes_of(sizes))
        computed = device_params(config, plain, sizes_of(whole))
        matrices = sum(math.prod(computed["layers"][name].shape) for name in COLUMN_AXES)
        self.matrices, self.head = matrices, math.prod(computed["head"].shape)
        rows = here * sizes["data"] * sizes["fsdp"]
        self.cache = cache_share(config, precision.size, length, rows, sizes_of(sizes))

    def decode(self) -> Step:
        """A token for every row, `length` tokens being in the cache."""
        pairs = self.here * self.length
        operations = 2 * (self.matrices + self.head) * self.here + self._attention(pairs)
        return self._step("decode", self.here, self._read() + self.cache, operations, self._forward)

    def prefill(self) -> Step:
        """Reads a prompt of every row, all at once."""
        tokens = self.here * self.length
        pairs = tokens * (self.length + 1) / 2
        operations = 2 * self.matrices * tokens + 2 * self.head * self.here
        operations += self._attention(pairs)
        moved = self._read() + self.cache
        return self._step("prefill", tokens, moved, operations, self._forward)

    def lora(self) -> Step:
        """A step of an adapter: forwards, forwards again inside each block, and backwards through
        the activations. Every matrix is multiplied with three times."""
        return self._step("lora", *self._trained(3 * self._read()), self._backward)

    def full(self) -> Step:
        """A step of all parameters: forwards, and backwards through activations and weights."""
        elements = total_bytes(self.plain) // Precision(self.precision.dtype).size
        moved = elements * (_ADAM_MOVED + 3 * Precision(self.precision.dtype).size)
        return self._step("full", *self._trained(moved), self._learned)

    def _trained(self, moved: float) -> tuple[int, float, float]:
        """(tokens, bytes through memory, operations) of a training step."""
        tokens = self.here * self.length
        pairs = tokens * (self.length + 1) / 2
        operations = 2 * (self.matrices + self.head) * tokens + self._attention(pairs)
        return tokens, moved, 3 * operations

    def _step(self, name: str, tokens: int, moved: float, operations: float, talks: Any) -> Step:
        fixed, growing = talks(tokens)
        bandwidth, flops = self.links.card.bandwidth, self.links.flops
        kept = moved - (self.cache if name in ("decode", "prefill") else 0)
        return Step(
            name,
            tokens * self.sizes["data"] * self.sizes["fsdp"],
            moved / bandwidth,
            operations / flops,
            fixed + growing,
            kept / bandwidth,
            fixed.seconds + talks(0)[1].seconds,  # the steps of rings through which nothing goes
        )

    def _read(self) -> int:
        """Bytes of weights that a step reads; of the embedding it needs a few rows."""
        return total_bytes(self.gathered) - total_bytes(self.gathered["embed"])

    def _attention(self, pairs: float) -> float:
        """Operations, for pairs of a query and a key."""
        heads = self.config.num_heads // self.sizes["tensor"]
        return 4 * self.config.num_layers * heads * self.config.head_dim * pairs

    def _forward(self, tokens: int) -> tuple[Talk, Talk]:
        """(what does not depend on the batch, what does)."""
        reduced = self._reduced(tokens) * (2 * self.config.num_layers + 1)
        logits = min(self.here, tokens) * self.config.vocab_size * _FLOAT32
        return self._gathered(self.precision), reduced + gather(
            self.links, self.sizes, "tensor", logits
        )

    def _backward(self, tokens: int) -> tuple[Talk, Talk]:
        reduced = self._reduced(tokens) * (5 * self.config.num_layers + 2)
        return self._gathered(self.precision) * 2, reduced

    def _learned(self, tokens: int) -> tuple[Talk, Talk]:
        reduced = self._reduced(tokens) * (4 * self.config.num_layers + 2)
        weights = self._gathered(Precision(self.precision.dtype)) * 2
        scattered = self._gathered(Precision("float32"))
        gradients = all_reduce(self.links, self.sizes, "data", total_bytes(self.plain))
        return weights + scattered + gradients, reduced

    def _reduced(self, tokens: int) -> Talk:
        size = tokens * self.config.hidden_size * self.precision.size
        return all_reduce(self.links, self.sizes, "tensor", size)

    def _gathered(self, precision: Precision) -> Talk:
        """Every matrix once, over fsdp."""
        whole = {**self.sizes, "data": 1, "fsdp": 1}
        params = _cut(device_params(self.config, precision, sizes_of(whole)))
        total = Talk()
        for name, part in params.items():
            times = self.config.num_layers if name in COLUMN_AXES else 1
            one = gather(self.links, self.sizes, "fsdp", total_bytes(part) / times)
            total = total + one * times
        return total


def report(cost: MeshCost) -> list[str]:
    """The costs in lines, for people."""
    links, card = cost.links, cost.links.card
    lines = [
        f"mesh {mesh_text(cost.sizes)} of {cost.devices} x {links.name}: {cost.precision.name}, "
        f"{cost.batch:,} x {cost.length:,} tokens",
        f"each device ({human_size(card.memory)}, {card.bandwidth / 1e9:,.0f} GB/s, "
        f"{links.flops / 1e12:,.0f} TFLOP/s, {links.link * links.ring / 1e9:,.0f} GB/s around a "
        f"ring, {links.network / 1e9:,.1f} GB/s of network):",
        f"  weights {human_size(cost.weights)}, cache {human_size(cost.cache)}, without activations"
        f"{_fits(cost.weights + cost.cache, card.memory)}",
        f"  in training without activations: LoRA {human_size(cost.adapted)}"
        f"{_fits(cost.adapted, card.memory)}, all parameters {human_size(cost.trained)}"
        f"{_fits(cost.trained, card.memory)}",
        "times that a step takes at least, at the makers' rates:",
    ]
    for step in cost.steps.values():
        talk = step.talk
        lines.append(
            f"  {step.name}: memory {_time(step.memory_s)}, products {_time(step.products_s)}, "
            f"links {_time(talk.seconds)}: limited by {step.limit}, at most "
            f"{step.tokens / step.overlapped_s:,.0f} tokens/s"
        )
        lines.append(
            f"    {talk.calls} collectives; a device sends {human_size(round(talk.link_bytes))} "
            f"through {links.ring} links ({human_size(round(talk.link_bytes / links.ring))} each)"
            f" and {human_size(round(talk.network_bytes))} through the network"
        )
        needed = step.tokens_needed
        lines.append(
            "    no batch makes products take longest"
            if needed is None
            else f"    products take longest from {needed:,} tokens a step on"
        )
    return lines


def _fits(size: int, memory: int) -> str:
    return "" if size < memory else " (too much)"


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
