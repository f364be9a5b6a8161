"""What the programs need on the device beside weights and cache: a formula.

It follows the largest arrays that are alive together while prompts are read and while a token is
drawn. Tests hold it against what XLA reports of the compiled programs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from glm2_jax.config import GLMConfig

if TYPE_CHECKING:
    from infer.plan import Precision

CHUNK = 2048  # tokens of prompts, of all rows together, that are read at once
_FLOAT32 = 4
# Bounds of the model's blocks, in elements (see `glm2_jax.model` and `glm2_jax.attention`).
_MLP_ELEMENTS = 2**26
_SCORES = 2**25


def temporary_bytes(
    config: GLMConfig, precision: Precision, slots: int, rows: int, platform: str, chunk: int
) -> int:
    """The most that any of the programs needs.

    Args:
      slots, rows: of the cache.
      chunk: most tokens that are read at once.
    """
    width = min(max(1, chunk // rows), slots)
    return max(
        prefill_bytes(config, precision, slots, rows, width, platform),
        decode_bytes(config, precision, slots, rows, platform),
        growing_bytes(config, precision, slots, rows),
    )


def growing_bytes(config: GLMConfig, precision: Precision, slots: int, rows: int) -> int:
    """The smaller cache that is copied into one of `slots` slots."""
    smaller = 1 << (max(slots, 2) - 1).bit_length() - 1
    return smaller * rows * _slot_bytes(config, precision) * config.num_layers


def prefill_bytes(
    config: GLMConfig, precision: Precision, slots: int, rows: int, width: int, platform: str
) -> int:
    """Reading `width` tokens of every row."""
    tokens, size = rows * width, precision.size
    D, F, N = config.hidden_size, config.ffn_hidden_size, config.num_heads
    heads = (N + 2 * config.num_kv_heads) * config.head_dim
    activations = tokens * (2 * D + heads) * size
    at_once = min(tokens, max(1, _MLP_ELEMENTS // (2 * F)))
    mlp = at_once * F * (2 * _FLOAT32 + size)
    scores = min(tokens * N * slots, _SCORES) * _FLOAT32
    attention = 3 * scores + rows * slots * _slot_bytes(config, precision)
    weight = 2 * F * D * size if platform != "cpu" else 0
    return activations + weight + max(mlp, attention) + sampling_bytes(config, rows)


def decode_bytes(
    config: GLMConfig, precision: Precision, slots: int, rows: int, platform: str
) -> int:
    """One token of every row."""
    layer = rows * slots * _slot_bytes(config, precision) // 2
    scores = rows * config.num_heads * slots * _FLOAT32
    copied = config.num_layers if platform == "gpu" else 0
    return layer * (1 + copied) + scores + sampling_bytes(config, rows)


def sampling_bytes(config: GLMConfig, rows: int) -> int:
    """Logits, and what drawing from them takes."""
    return rows * config.vocab_size * 6 * _FLOAT32


def _slot_bytes(config: GLMConfig, precision: Precision) -> int:
    """Keys and values of one token in one layer."""
    return 2 * config.num_kv_heads * config.head_dim * precision.size
