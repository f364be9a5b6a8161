"""How much memory a model needs to answer, from its configuration alone.

Weights and cache are counted exactly; what the programs need besides them is in
`infer.memory.temporaries`. Nothing here needs jax, except a mesh: a plan is made before anything is
loaded, and where jax does not work. With a mesh the bytes are those of each device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from glm2_jax.config import GLMConfig
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.runtime.buckets import padded_batch
from glm2_jax.schemes import COLUMN_AXES
from infer.memory import shares
from infer.memory.precision import Precision
from infer.memory.shares import Sizes
from infer.memory.temporaries import temporary_bytes

SHORTEST = 64  # slots of the smallest cache
CHUNKS = (1024, 512, 256)  # prefill chunks that are suggested if a larger one does not fit
DRAFTS = (16, 8, 4, 2, 0)  # draft tokens that are suggested if more do not fit
# What jax and its libraries take before any of our arrays is there.
RUNTIME = {"cpu": 400_000_000, "gpu": 600_000_000, "tpu": 100_000_000}


@dataclass(frozen=True)
class Plan:
    """What is to be answered with, and the bytes that it takes on the device, or on each one of a
    mesh."""

    config: GLMConfig
    precision: Precision
    context: int  # tokens of a prompt and its answer together
    batch: int = 1  # prompts that are answered together
    platform: str = "gpu"  # or "cpu", "tpu"
    chunk: int = PREFILL_CHUNK  # most prompt tokens, of all rows together, per prefill
    columns: int = 1  # tokens of each row that a step reads: one, and its draft tokens
    prefix: int = 0  # slots of each row before all tokens, for a prefix (P-Tuning v2)
    mesh: Sizes | None = None  # None = one device

    @property
    def rows(self) -> int:
        """Rows of the batch with the empty ones that fill it up, on all devices together."""
        return padded_batch(self.batch, self._pieces)

    @cached_property
    def weights(self) -> int:
        # The params hold the prefix once more.
        copy = cache_bytes(self.config, self.precision.size, self.prefix, 1)
        if self.mesh is None:
            return weight_bytes(self.config, self.precision) + copy
        params = shares.device_params(self.config, self.precision, self.mesh)
        return shares.total_bytes(params) + copy

    @cached_property
    def cache(self) -> int:
        size, slots = self.precision.cache_size(self.platform), self.prefix + self.context
        if self.mesh is None:
            return cache_bytes(self.config, size, slots, self.rows)
        return shares.cache_share(self.config, size, slots, self.rows, self.mesh)

    @cached_property
    def temporary(self) -> int:
        """The most that any program needs besides them."""
        part = self.config if self.mesh is None else shares.share_of(self.config, self.mesh)
        return temporary_bytes(self, part, self.rows // self._pieces, self.chunk // self._pieces)

    @property
    def runtime(self) -> int:
        """What jax itself takes."""
        return RUNTIME[self.platform]

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporary + self.runtime

    @property
    def _pieces(self) -> int:
        return 1 if self.mesh is None else shares.row_pieces(self.mesh)


def array_bytes(precision: Precision, name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a weight, or of a part of it with this shape."""
    if precision.scheme is None or not precision.scheme.covers(name):
        return math.prod(shape) * precision.size
    values, scales = precision.scheme.shapes(shape, COLUMN_AXES.get(name, 1))
    return math.prod(values) + 4 * math.prod(scales)


def weight_bytes(config: GLMConfig, precision: Precision) -> int:
    """Return the bytes of all weights, as they are on the device."""
    D, F, H = config.hidden_size, config.ffn_hidden_size, config.head_dim
    N, K, L, V = config.num_heads, config.num_kv_heads, config.num_layers, config.vocab_size
    arrays = (  # all that can be quantized, and how often it is there
        ("q", (N, H, D), L),
        ("k", (K, H, D), L),
        ("v", (K, H, D), L),
        ("o", (D, N, H), L),
        ("gate_up", (2, F, D), L),
        ("down", (D, F), L),
        ("embed", (V, D), 1),
        ("head", (V, D), 1),
    )
    rest = config.num_params - sum(math.prod(shape) * times for _, shape, times in arrays)
    quantizable = sum(times * array_bytes(precision, name, shape) for name, shape, times in arrays)
    return rest * precision.size + quantizable


def cache_bytes(config: GLMConfig, size: int, slots: int, rows: int) -> int:
    """Return the bytes of keys and values of every layer, `size` bytes a number."""
    numbers = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    return numbers * size * slots * rows


def largest_context(plan: Plan, memory: int) -> int:
    """Return the longest context, in steps of 64 tokens, with which a plan that is otherwise the
    same fits into `memory` bytes; 0 = none does."""

    def fits(context: int) -> bool:
        return replace(plan, context=context).total <= memory

    longest = plan.config.seq_length
    if fits(longest):
        return longest
    low, high = 0, -(-longest // SHORTEST)  # fits (or is nothing), does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * SHORTEST) else (low, middle)
    return low * SHORTEST


def rate_bound(plan: Plan, bandwidth: float) -> float:
    """Return the tokens per second, all rows together, if reading memory were all that a step does.

    Every step reads all weights except the embedding, of which it needs a few rows, and the cache;
    the devices of a mesh read their parts at the same time, and what they send each other is left
    out.
    """
    config, precision = plan.config, plan.precision
    if plan.mesh is None:
        shape = config.vocab_size, config.hidden_size
        embedding = array_bytes(precision, "embed", shape)
    else:
        params = shares.device_params(config, precision, plan.mesh)
        embedding = shares.total_bytes(params["embed"])
    return plan.batch * bandwidth / (plan.weights - embedding + plan.cache)


def nearest(wanted: Plan, memory: int, choices: Iterable[Precision]) -> list[Plan]:
    """Return plans that fit into `memory` bytes where `wanted` does not, each as near to it as can
    be; empty where nothing fits.

    Those that change one thing come first: fewer draft tokens, smaller prefill chunks, narrower
    weights (of `choices`, the widest first), a shorter context, fewer prompts at once. Where no one
    change is enough, there is one plan that changes all: the widest weights that fit at all, with
    their longest context.
    """

    def longest(**changes: Any) -> Plan:
        plan = replace(wanted, **changes)
        return replace(plan, context=min(largest_context(plan, memory), wanted.context))

    def fitting(plans: Iterable[Plan]) -> list[Plan]:
        """Return the first plan that fits, if any."""
        return [plan for plan in plans if plan.context and plan.total <= memory][:1]

    size = weight_bytes(wanted.config, wanted.precision)
    narrower = [choice for choice in choices if weight_bytes(wanted.config, choice) < size]
    powers = reversed(range((wanted.batch - 1).bit_length()))
    chunks = [n for n in CHUNKS if n < min(wanted.chunk, wanted.rows * wanted.context)]
    one_change = [
        *fitting(replace(wanted, columns=1 + n) for n in DRAFTS if 1 + n < wanted.columns),
        *fitting(replace(wanted, chunk=n) for n in chunks),
        *fitting(replace(wanted, precision=choice) for choice in narrower),
        *fitting([longest()]),
        *fitting(replace(wanted, batch=1 << power) for power in powers),
    ]
    return one_change or fitting(
        longest(precision=choice, batch=1, chunk=n, columns=1)
        for choice in (wanted.precision, *narrower)
        for n in (wanted.chunk, *chunks[-1:])
    )
