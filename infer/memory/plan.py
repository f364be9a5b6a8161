"""How much memory a model needs to answer, from its configuration alone.

Weights and cache are counted exactly. What the programs need besides them is a formula: it adds up
the large arrays that are alive together at the worst moment, as XLA lays them out; tests compare it
with what XLA reports of the compiled programs. Sizes are bytes; with a mesh, those of each device.
Nothing here needs jax, except a mesh: a plan is made before anything is loaded, and where jax does
not work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from glm2_jax.config import GLMConfig
from glm2_jax.limits import CHUNK_ELEMENTS, FEW_ROWS, KEYS, MLP_ELEMENTS, PREFILL_CHUNK, SCORES
from glm2_jax.parts import TABLE, parts_of, tables_of
from glm2_jax.runtime.buckets import padded_batch
from glm2_jax.schemes import COLUMN_AXES
from infer.memory import shares
from infer.memory.precision import Precision, vector_bytes
from infer.memory.shares import Sizes

SHORTEST = 64  # slots of the smallest cache
CHUNKS = (1024, 512, 256)  # prefill chunks that are suggested if a larger one does not fit
DRAFTS = (16, 8, 4, 2, 0)  # draft tokens that are suggested if more do not fit
# What jax and its libraries take before any of our arrays is there.
RUNTIME = {"cpu": 400_000_000, "gpu": 600_000_000, "tpu": 100_000_000}
_FLOAT32 = 4
# Numbers per logit that drawing takes (scores, weights) on a CPU; compiled for an H200 it is 5.3.
_DRAWING = 6


@dataclass(frozen=True)
class Plan:
    """What is to be answered with, and the bytes that it takes on the device, or on each one of a
    mesh."""

    config: GLMConfig
    precision: Precision
    context: int  # tokens of a prompt and its answer together
    batch: int = 1  # prompts that are answered together
    platform: str = "gpu"  # or "cpu", "tpu"
    # Most prompt tokens, of all rows together, per prefill, where the context is causal.
    chunk: int = PREFILL_CHUNK
    columns: int = 1  # tokens of each row that a step reads: one, and its draft tokens
    prefix: int = 0  # slots of each row before all tokens, for a prefix (P-Tuning v2)
    mesh: Sizes | None = None  # None = one device
    kv: str = "auto"  # how the cache stores keys and values, of `glm2_jax.choices.KV`

    @property
    def rows(self) -> int:
        """Rows of the batch with the empty ones that fill it up, on all devices together."""
        return padded_batch(self.batch, self._pieces)

    @property
    def prefill(self) -> int:
        """Most prompt tokens, of all rows together, that are read at once."""
        return self.rows * self.context if self.config.block.bidirectional else self.chunk

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
        size = self.precision.cache_size(self.platform, self.kv)
        slots = self.prefix + self.context
        if self.mesh is None:
            return cache_bytes(self.config, size, slots, self.rows)
        return shares.cache_share(self.config, size, slots, self.rows, self.mesh)

    @cached_property
    def temporary(self) -> int:
        """The most that any program needs besides them."""
        part = self.config if self.mesh is None else shares.share_of(self.config, self.mesh)
        return temporary_bytes(self, part, self.rows // self._pieces, self.prefill // self._pieces)

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
    scheme = precision.scheme
    if scheme is None or not scheme.covers(name):
        return math.prod(shape) * precision.size
    values, scales = scheme.of(name).shapes(shape, COLUMN_AXES.get(name, 1))
    return math.prod(values) + 4 * math.prod(scales)


def weight_bytes(config: GLMConfig, precision: Precision) -> int:
    """Return the bytes of all weights, as they are on the device."""
    return sum(
        array_bytes(precision, part.name, part.shape(config))
        * (config.num_layers if part.in_layers else 1)
        for part in parts_of(config)
    )


def cache_bytes(config: GLMConfig, size: int, slots: int, rows: int) -> int:
    """Return the bytes of keys and values of every layer, `size` bytes a number; 1 = int8, with a
    scale for each vector."""
    vectors = config.num_layers * 2 * config.num_kv_heads
    return vectors * vector_bytes(config.head_dim, size) * slots * rows


def temporary_bytes(plan: Plan, config: GLMConfig, rows: int, chunk: int) -> int:
    """Return the most that any program needs besides the weights and the cache of a plan.

    A program on the way there has a smaller cache, and so may need more of its own. `config`,
    `rows` and `chunk` (tokens of a prefill) are the part of one device.
    """
    slots, form = plan.context, (config, plan.precision, plan.platform)
    slot, most = rows * _slot(*form, plan.kv) * config.num_layers, 0
    for size in (*(1 << power for power in range(6, (slots - 1).bit_length())), slots):
        prompt = min(max(1, chunk // rows), size)
        for width, drawn in ((plan.columns, plan.columns), (prompt, 1)):
            needed = program_bytes(*form, plan.prefix + size, rows, width, drawn, plan.kv)
            most = max(most, needed - (slots - size) * slot)
    # The cache grows by copying a smaller one: at most the bucket before it, where the model's
    # context ends the growth early.
    smaller = 1 << ((max(slots, 2) - 1).bit_length() - 1)
    return max(most, (smaller + plan.prefix) * slot)


def _slot(config: GLMConfig, precision: Precision, platform: str, kv: str) -> int:
    """Return keys and values of one token in one layer."""
    size = precision.cache_size(platform, kv)
    return 2 * config.num_kv_heads * vector_bytes(config.head_dim, size)


def program_bytes(
    config: GLMConfig,
    precision: Precision,
    platform: str,
    slots: int,
    rows: int,
    width: int,
    drawn: int = 1,
    kv: str = "auto",
) -> int:
    """Return what a program needs that reads `width` tokens of every row into a cache of `slots`,
    and draws a token after each of the last `drawn`: both are 1 in a plain decode step, and more
    where it verifies draft tokens."""
    D, F, N, H = config.hidden_size, config.ffn_hidden_size, config.num_heads, config.head_dim
    size, scheme, tokens = precision.size, precision.scheme, rows * width
    hidden = 2 * tokens * D * size  # the hidden states, and the same normalized
    layer = rows * slots * _slot(config, precision, platform, kv)
    copies = 1 if width == 1 or platform == "tpu" else 2
    if platform == "cpu" and kv == "int8":  # integers are converted, scaled probabilities copied
        layer, copies = rows * slots * 2 * config.num_kv_heads * H * size, copies + (width > 1)

    scores, sums, early = rows * N * width * slots, 0, 0
    if scores > SCORES and width > 1:  # attention block by block
        queries = min(width, max(1, SCORES // (rows * N * KEYS)))
        added = N * (H + 2) * _FLOAT32  # what it adds up for a query over blocks of keys
        scores, sums = rows * N * queries * min(KEYS, slots), rows * queries * added
        if platform == "cpu":  # with a list of layers, their results are allocated at the beginning
            early = config.num_layers * tokens * (N * H * size if queries < width else added)
    if platform == "gpu" and tokens == 1:  # both keys and values are copied out of the cache
        attention = scores * _FLOAT32 + layer
    elif platform == "gpu":
        # Keys are read in place; probabilities are rounded for the product with values.
        attention = scores * (_FLOAT32 + size) + layer // 2 + sums
    else:
        attention = copies * scores * _FLOAT32 + layer

    C = config.mlp_inputs
    at_once = min(tokens, max(1, MLP_ELEMENTS // (C * F)))
    mlp = at_once * C * F * _FLOAT32 + hidden  # what is alive between the two products
    if platform == "gpu":
        mlp += C * F * D * size if tokens > FEW_ROWS else 0  # a copy of the weight
    elif platform == "tpu":  # what a chunk of 2048 takes in 8192 slots; shorter ones less
        sliced = scheme is not None and scheme.bits == 4  # `down`, out of the layers
        mlp = 2 * (mlp + at_once * F * size) + (F * D // 2 if sliced else 0)
    else:
        mlp += at_once * F * size + (10 * CHUNK_ELEMENTS if scheme is not None else 0)

    logits = rows * drawn * config.vocab_size * _FLOAT32
    return max(attention + hidden, mlp, _DRAWING * logits) + logits + early


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

    Every step reads the cache and all weights except tables such as the embedding, of which it
    needs a few rows; the devices of a mesh read their parts at the same time, and what they send
    each other is left out.
    """
    config, precision, names = plan.config, plan.precision, tables_of(plan.config)
    if plan.mesh is None:
        tables = sum(array_bytes(precision, name, TABLE[name].shape(config)) for name in names)
    else:
        params = shares.device_params(config, precision, plan.mesh)
        tables = sum(shares.total_bytes(params[name]) for name in names)
    return plan.batch * bandwidth / (plan.weights - tables + plan.cache)


def nearest(wanted: Plan, memory: int, choices: Iterable[Precision]) -> list[Plan]:
    """Return plans that fit into `memory` bytes where `wanted` does not, each as near to it as can
    be; empty where nothing fits.

    Those that change one thing come first: fewer draft tokens, smaller prefill chunks, narrower
    weights (of `choices`, the widest first), a shorter context, fewer prompts at once, a cache in
    int8. Where no one
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
    chunks = [n for n in CHUNKS if n < min(wanted.prefill, wanted.rows * wanted.context)]
    chunks = [] if wanted.config.block.bidirectional else chunks
    one_change = [
        *fitting(replace(wanted, columns=1 + n) for n in DRAFTS if 1 + n < wanted.columns),
        *fitting(replace(wanted, chunk=n) for n in chunks),
        *fitting(replace(wanted, precision=choice) for choice in narrower),
        *fitting([longest()]),
        *fitting(replace(wanted, batch=1 << power) for power in powers),
        *fitting([replace(wanted, kv="int8")] * (wanted.kv != "int8")),
    ]
    return one_change or fitting(
        longest(precision=choice, batch=1, chunk=n, columns=1)
        for choice in (wanted.precision, *narrower)
        for n in (wanted.chunk, *chunks[-1:])
    )
