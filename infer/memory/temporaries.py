"""What the programs need on the device beside weights and cache: a formula.

It adds up the large arrays that are alive together at the worst moment, as XLA lays them out; tests
hold it against what XLA reports of the compiled programs. All sizes are bytes.
B rows, T tokens of each that are read at once, M = B T, S slots of the cache. A step that verifies
drafts reads several tokens of a row, its columns, and draws a token behind each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from glm2_jax.config import GLMConfig
from glm2_jax.limits import CHUNK_ELEMENTS, FEW_ROWS, KEYS, MLP_ELEMENTS, SCORES

if TYPE_CHECKING:
    from infer.memory.precision import Precision

_FLOAT32 = 4
# Numbers for each logit that a token is drawn from: ranks, noise, ... XLA:CPU takes 10.25. Compiled
# for an H200 it is 6.5, without the room that sorting takes there.
_DRAWING = 10


def cache_number(precision: Precision, platform: str) -> int:
    """Bytes of a number in the cache."""
    return _FLOAT32 if platform == "cpu" else precision.size


def temporary_bytes(
    config: GLMConfig,
    precision: Precision,
    slots: int,
    rows: int,
    platform: str,
    chunk: int,
    columns: int = 1,
    prefix: int = 0,
) -> int:
    """The most that any of the programs needs beside the weights and the cache of `slots` slots.

    A program on the way there has a smaller cache, and so may need more of its own.

    Args:
      slots, rows: of the cache, without the prefix.
      chunk: most tokens that are read at once.
      columns: tokens of each row that a step reads, and draws behind.
      prefix: slots before those.
    """
    sizes = [1 << power for power in range(6, (slots - 1).bit_length())]  # caches on the way
    number = cache_number(precision, platform)
    slot = rows * _slot(config, number) * config.num_layers
    return max(
        growing_bytes(config, slots, rows, number) + prefix * slot,
        *(
            step_bytes(config, precision, prefix + size, rows, width, platform, drawn)
            - (slots - size) * slot
            for size in (*sizes, slots)
            for width, drawn in ((columns, columns), (min(max(1, chunk // rows), size), 1))
        ),
    )


def growing_bytes(config: GLMConfig, slots: int, rows: int, number: int) -> int:
    """The smaller cache that is copied into one of `slots` slots: at most the bucket before it,
    where the model's context ends the growth early."""
    smaller = 1 << ((max(slots, 2) - 1).bit_length() - 1)
    return smaller * rows * _slot(config, number) * config.num_layers


def step_bytes(
    config: GLMConfig,
    precision: Precision,
    slots: int,
    rows: int,
    width: int,
    platform: str,
    drawn: int = 1,
) -> int:
    """A program that reads `width` tokens of every row, 1 being a step of an answer, and draws a
    token behind each of the last `drawn`."""
    attention = _attention(config, precision, slots, rows, width, platform)
    mlp = _mlp(config, precision, rows * width, platform)
    drawing = _DRAWING * rows * drawn * config.vocab_size * _FLOAT32
    return max(attention, mlp, drawing) + _early(config, precision, slots, rows, width, platform)


def _attention(
    config: GLMConfig, precision: Precision, slots: int, rows: int, width: int, platform: str
) -> int:
    """Scores, a layer's keys and values, and the hidden states beside them."""
    scores = whole = rows * config.num_heads * width * slots
    sums = 0
    if whole > SCORES:
        queries = _queries(config, rows, width)
        scores = rows * config.num_heads * queries * min(KEYS, slots)
        sums = rows * queries * _added(config)
    layer = rows * slots * _slot(config, cache_number(precision, platform))
    hidden = _hidden(config, precision, rows * width)
    if platform == "gpu":
        if rows == width == 1:  # both keys and values are copied out of the cache
            return scores * _FLOAT32 + layer + hidden
        # Keys are read where they are; probabilities are rounded for the product with values.
        return scores * (_FLOAT32 + precision.size) + layer // 2 + sums + hidden
    copies = 2 if whole > SCORES else 3
    if width == 1 or platform == "tpu":
        copies = 1
    return copies * scores * _FLOAT32 + layer + hidden


def _mlp(config: GLMConfig, precision: Precision, tokens: int, platform: str) -> int:
    """What lies between the two products; on a GPU with a copy of the weight that is multiplied."""
    D, F = config.hidden_size, config.ffn_hidden_size
    at_once = min(tokens, max(1, MLP_ELEMENTS // (2 * F)))
    between = at_once * 2 * F * _FLOAT32
    if platform == "gpu":
        weight = 2 * F * D * precision.size if tokens > FEW_ROWS else 0
        return weight + between + _hidden(config, precision, tokens)
    between += at_once * F * precision.size + _hidden(config, precision, tokens)
    if platform == "tpu":  # what a chunk of 2048 takes in 8192 slots; shorter ones take less
        packed = F * D // 2 if _bits(precision) == 4 else 0  # of `down`, sliced out of the layers
        return 2 * between + packed
    return between + (10 * CHUNK_ELEMENTS if precision.scheme is not None else 0)


def _bits(precision: Precision) -> int | None:
    return None if precision.scheme is None else precision.scheme.bits


def _early(
    config: GLMConfig, precision: Precision, slots: int, rows: int, width: int, platform: str
) -> int:
    """Results of attention block by block: with a list of layers, XLA:CPU makes the empty arrays
    that they are written to for all layers at once, at the beginning."""
    if platform != "cpu":
        return 0
    if rows * config.num_heads * width * slots <= SCORES:
        return 0
    return config.num_layers * rows * width * _sums(config, precision, rows, width)


def _queries(config: GLMConfig, rows: int, width: int) -> int:
    """Queries of a block of attention."""
    return min(width, max(1, SCORES // (rows * config.num_heads * KEYS)))


def _sums(config: GLMConfig, precision: Precision, rows: int, width: int) -> int:
    """What attention over blocks of keys adds up for a token, or its result, if blocks of queries
    come one after another."""
    if _queries(config, rows, width) < width:
        return config.num_heads * config.head_dim * precision.size
    return _added(config)


def _added(config: GLMConfig) -> int:
    """What attention over blocks of keys adds up for a query."""
    return config.num_heads * (config.head_dim + 2) * _FLOAT32


def _hidden(config: GLMConfig, precision: Precision, tokens: int) -> int:
    """The hidden states, and the same normalized."""
    return 2 * tokens * config.hidden_size * precision.size


def _slot(config: GLMConfig, number: int) -> int:
    """Keys and values of one token in one layer, `number` bytes each."""
    return 2 * config.num_kv_heads * config.head_dim * number
