"""The bytes of a decode step and of the cache, by what an idea has to read."""

from __future__ import annotations

from typing import Any

from glm2_jax import GLMConfig
from glm2_jax.ideas import Reads
from glm2_jax.parts import tables_of
from infer.bench.programs import Shape
from infer.memory.shares import total_bytes


def usual_reads(config: GLMConfig, shape: Shape) -> Reads:
    """Return what a step without an idea reads, on average over the steps of one row."""
    seen = shape.context + (shape.steps + 1) / 2  # as `infer.bench.programs.work` counts
    return Reads(config.num_layers, 1, seen, seen, shape.context)


def step_bytes(config: GLMConfig, params: Any, vector: int, reads: Reads) -> float:
    """Return the bytes that a step of one row has to read: the usual ones are those of
    `infer.bench.programs.work`. The layers are a list, `vector` the bytes of a cached key."""
    layer, head = total_bytes(params["layers"][0]), total_bytes(params[config.block.head])
    tables = tables_of(config)
    once = total_bytes(params) - config.num_layers * layer - head
    once -= sum(total_bytes(params[name]) for name in tables)
    once += len(tables) * config.hidden_size * params["final_norm"].dtype.itemsize
    made = (params["layers"][0].get(f"{name}{end}") for name in "kv" for end in ("", "_bias"))
    weights = reads.layers * layer + reads.projections * total_bytes(list(made))
    cached = (reads.keys + reads.values) * vector + reads.notes * 4
    cached *= reads.layers * config.num_kv_heads
    return once + weights + reads.heads * head + cached


def kept_bytes(config: GLMConfig, vector: int, reads: Reads) -> float:
    """Return the bytes of the keys and values, and notes, that the cache of a row has to keep."""
    notes = reads.slots * 4 * len(config.idea.notes)
    return config.num_layers * config.num_kv_heads * (2 * reads.slots * vector + notes)
