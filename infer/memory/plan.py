"""How much memory a model needs to answer, from its configuration alone.

Weights and cache are counted exactly; what the programs need beside them is in
`infer.memory.temporaries`. No jax but for a mesh: this answers before anything is loaded, and where
jax does not work. For a mesh the bytes are those of each device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from glm2_jax.config import GLMConfig
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.runtime.buckets import padded_batch
from glm2_jax.schemes import COLUMN_AXES, EMBEDDINGS, scheme_flags
from infer.memory import shares
from infer.memory.precision import Precision
from infer.memory.shares import Sizes
from infer.memory.temporaries import cache_number, temporary_bytes

SHORTEST = 64  # slots of the smallest cache
CHUNKS = (1024, 512, 256)  # of prompts, that are advised where there is no room for more at once
DRAFTS = (16, 8, 4, 2, 0)  # that are advised where there is no room to verify more at once
# What jax and its libraries take before any of our arrays is there.
RUNTIME = {"cpu": 400_000_000, "gpu": 600_000_000, "tpu": 100_000_000}
# Of a GPU's memory: the rest is the driver's, and what a desktop shows.
GPU_SHARE = 0.95
SHARE_VARIABLES = (  # by which a user decides what jax takes of a GPU's memory
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_CLIENT_MEM_FRACTION",
)


def flags(precision: Precision, stored: str | None = None) -> str:
    """The flags that ask for a precision."""
    quantize = precision.quantize
    if stored is not None:
        quantize = None if quantize == stored else "none"
    return f"--dtype {precision.dtype}" + (f" {scheme_flags(quantize)}" if quantize else "")


@dataclass(frozen=True)
class Plan:
    """Bytes that answering takes on the device, or on each one of a mesh.

    Attributes:
      context: tokens of prompt and answer together. batch: prompts at once.
      weights, cache: arrays that stay.
      temporary: the most that any program needs beside them.
      runtime: of jax itself.
      chunk: most tokens of prompts, of all rows together, that are read at once.
      columns: tokens of each row that a step reads: one, and the drafts that it verifies.
      prefix: slots of each row before all tokens, for a prefix (P-Tuning v2).
      mesh: the sizes of its axes; None = one device.
    """

    precision: Precision
    context: int
    batch: int
    weights: int
    cache: int
    temporary: int
    runtime: int
    chunk: int
    columns: int = 1
    prefix: int = 0
    mesh: Sizes | None = None

    @property
    def rows(self) -> int:
        """Of the batch as it is computed, on all devices together."""
        return _rows(self.batch, self.mesh)

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporary + self.runtime


def make_plan(
    config: GLMConfig,
    precision: Precision,
    context: int,
    batch: int = 1,
    *,
    platform: str = "gpu",
    chunk: int = PREFILL_CHUNK,
    columns: int = 1,
    prefix: int = 0,
    mesh: Sizes | None = None,
) -> Plan:
    """The plan for prompts and answers of up to `context` tokens, `batch` of them together.

    Args:
      platform: "cpu", "gpu" or "tpu".
      chunk: most tokens of a prompt that are read at once.
      columns: tokens of each row that a step reads: one, and the drafts that it verifies.
      prefix: slots of each row before all tokens; the params have it once more.
      mesh: over which the model is spread.
    """
    rows, number = _rows(batch, mesh), cache_number(precision, platform)
    copy = cache_bytes(config, precision.size, prefix, 1)  # of the prefix, in the params
    if mesh is None:
        weights = weight_bytes(config, precision)
        cache = cache_bytes(config, number, prefix + context, rows)
        part, part_rows, at_once = config, rows, chunk
    else:
        weights = shares.weight_share(config, precision, mesh)
        cache = shares.cache_share(config, number, prefix + context, rows, mesh)
        part, part_rows = shares.share_of(config, mesh), rows // shares.row_pieces(mesh)
        at_once = chunk // shares.row_pieces(mesh)
    return Plan(
        precision,
        context,
        batch,
        weights + copy,
        cache,
        temporary_bytes(part, precision, context, part_rows, platform, at_once, columns, prefix),
        RUNTIME[platform],
        chunk,
        columns,
        prefix,
        mesh,
    )


def _rows(batch: int, mesh: Sizes | None) -> int:
    """Rows of a batch with the empty ones that fill it up."""
    return padded_batch(batch, 1 if mesh is None else shares.row_pieces(mesh))


def matrix_shapes(config: GLMConfig) -> dict[str, tuple[int, ...]]:
    """The matrices of one layer, those that can be quantized."""
    D, F, H = config.hidden_size, config.ffn_hidden_size, config.head_dim
    N, K = config.num_heads, config.num_kv_heads
    return {
        "q": (N, H, D),
        "k": (K, H, D),
        "v": (K, H, D),
        "o": (D, N, H),
        "gate_up": (2, F, D),
        "down": (D, F),
    }


def layer_bytes(config: GLMConfig, precision: Precision) -> int:
    """The matrices of one layer."""
    total = 0
    for name, shape in matrix_shapes(config).items():
        if precision.scheme is None:
            total += math.prod(shape) * precision.size
        else:
            values, scales = precision.scheme.shapes(shape, COLUMN_AXES[name])
            total += math.prod(values) + 4 * math.prod(scales)
    return total


def weight_bytes(config: GLMConfig, precision: Precision) -> int:
    """All weights, as they are on the device."""
    matrices = config.num_layers * sum(math.prod(s) for s in matrix_shapes(config).values())
    tables = len(EMBEDDINGS) * config.vocab_size * config.hidden_size
    plain = (config.num_params - matrices - tables) * precision.size
    plain += len(EMBEDDINGS) * table_bytes(config, precision)
    return plain + config.num_layers * layer_bytes(config, precision)


def table_bytes(config: GLMConfig, precision: Precision) -> int:
    """The embedding, or the head."""
    shape = (config.vocab_size, config.hidden_size)
    if precision.scheme is None or not precision.scheme.embeddings:
        return math.prod(shape) * precision.size
    values, scales = precision.scheme.shapes(shape, 1)
    return math.prod(values) + 4 * math.prod(scales)


def cache_bytes(config: GLMConfig, size: int, slots: int, rows: int) -> int:
    """Keys and values of every layer, `size` bytes a number."""
    numbers = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    return numbers * size * slots * rows


def largest_context(
    config: GLMConfig,
    precision: Precision,
    batch: int,
    memory: int,
    *,
    platform: str = "gpu",
    chunk: int = PREFILL_CHUNK,
    columns: int = 1,
    prefix: int = 0,
    mesh: Sizes | None = None,
) -> int:
    """The longest context that fits into `memory` bytes, in steps of 64 tokens; 0 = none does."""

    def fits(context: int) -> bool:
        sizes: dict[str, Any] = {"chunk": chunk, "columns": columns, "prefix": prefix}
        sizes |= {"platform": platform, "mesh": mesh}
        return make_plan(config, precision, context, batch, **sizes).total <= memory

    if fits(config.seq_length):
        return config.seq_length
    low, high = 0, -(-config.seq_length // SHORTEST)  # fits (or is nothing), does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * SHORTEST) else (low, middle)
    return low * SHORTEST


def rate_bound(config: GLMConfig, plan: Plan, bandwidth: float) -> float:
    """Tokens per second, all rows together, if reading memory were all that a step does.

    Every step reads all weights but the embedding, of which it needs a few rows, and the cache; the
    devices of a mesh read their parts at the same time, and what they send each other is left out.
    """
    embedding = table_bytes(config, plan.precision)
    if plan.mesh is not None:
        embedding = shares.embedding_share(config, plan.precision, plan.mesh)
    return plan.batch * bandwidth / (plan.weights - embedding + plan.cache)


def nearest(
    config: GLMConfig,
    wanted: Plan,
    memory: int,
    choices: Iterable[Precision],
    *,
    platform: str = "gpu",
) -> list[Plan]:
    """Plans that fit into `memory` bytes where `wanted` does not, each as near to it as can be.

    Those that change one thing come first: fewer drafts, prompts read in smaller chunks, narrower
    weights, a shorter context, fewer prompts at once. Where no one change is enough, there is one
    plan that changes all: the widest weights that fit at all, with their longest context. Empty
    where nothing fits.

    Args:
      choices: precisions to choose from, the widest first.
    """
    now, context, batch, chunk = wanted.precision, wanted.context, wanted.batch, wanted.chunk
    columns = wanted.columns
    place: dict[str, Any] = {"platform": platform, "prefix": wanted.prefix, "mesh": wanted.mesh}

    def attempt(
        precision: Precision,
        context: int,
        batch: int,
        chunk: int = chunk,
        columns: int = columns,
    ) -> Plan | None:
        sizes = {**place, "chunk": chunk, "columns": columns}
        plan = make_plan(config, precision, context, batch, **sizes)
        return plan if context and plan.total <= memory else None

    def longest(
        precision: Precision, batch: int, chunk: int = chunk, columns: int = columns
    ) -> int:
        sizes = {**place, "chunk": chunk, "columns": columns}
        return min(largest_context(config, precision, batch, memory, **sizes), wanted.context)

    whole = weight_bytes(config, now)
    narrower = [choice for choice in choices if weight_bytes(config, choice) < whole]
    batches = [1 << power for power in reversed(range((batch - 1).bit_length()))]
    chunks = [size for size in CHUNKS if size < min(chunk, wanted.rows * context)]
    fewer_drafts = [1 + drafts for drafts in DRAFTS if 1 + drafts < columns]
    one_change = (
        next(filter(None, (attempt(now, context, batch, chunk, c) for c in fewer_drafts)), None),
        next(filter(None, (attempt(now, context, batch, size) for size in chunks)), None),
        next(filter(None, (attempt(choice, context, batch) for choice in narrower)), None),
        attempt(now, longest(now, batch), batch),
        next(filter(None, (attempt(now, context, fewer) for fewer in batches)), None),
    )
    found = [plan for plan in one_change if plan is not None]
    if found:
        return found
    every_change = (
        attempt(choice, longest(choice, 1, size, 1), 1, size, 1)
        for choice in (now, *narrower)
        for size in (chunk, *chunks[-1:])
    )
    return [plan for plan in every_change if plan is not None][:1]
