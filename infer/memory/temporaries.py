"""What the programs need on the device besides weights and cache: a formula.

It adds up the large arrays that are alive together at the worst moment, as XLA lays them out; tests
compare it with what XLA reports of the compiled programs. All sizes are bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from glm2_jax.config import GLMConfig
from glm2_jax.limits import CHUNK_ELEMENTS, FEW_ROWS, KEYS, MLP_ELEMENTS, SCORES

if TYPE_CHECKING:
    from infer.memory.plan import Plan
    from infer.memory.precision import Precision

_FLOAT32 = 4
# Numbers per logit that drawing takes: ranks, noise, ... XLA:CPU takes 10.25. Compiled for an H200
# it is 6.5, without the room that sorting takes there.
_DRAWING = 10


def temporary_bytes(plan: Plan, config: GLMConfig, rows: int, chunk: int) -> int:
    """Return the most that any program needs besides the weights and the cache of a plan.

    A program on the way there has a smaller cache, and so may need more of its own. `config`,
    `rows` and `chunk` (tokens of a prefill) are the part of one device.
    """
    slots, form = plan.context, (config, plan.precision, plan.platform)
    slot, most = rows * _slot(*form) * config.num_layers, 0
    for size in (*(1 << power for power in range(6, (slots - 1).bit_length())), slots):
        prompt = min(max(1, chunk // rows), size)
        for width, drawn in ((plan.columns, plan.columns), (prompt, 1)):
            needed = program_bytes(*form, plan.prefix + size, rows, width, drawn)
            most = max(most, needed - (slots - size) * slot)
    # The cache grows by copying a smaller one: at most the bucket before it, where the model's
    # context ends the growth early.
    smaller = 1 << ((max(slots, 2) - 1).bit_length() - 1)
    return max(most, (smaller + plan.prefix) * slot)


def _slot(config: GLMConfig, precision: Precision, platform: str) -> int:
    """Return keys and values of one token in one layer."""
    return 2 * config.num_kv_heads * config.head_dim * precision.cache_size(platform)


def program_bytes(
    config: GLMConfig,
    precision: Precision,
    platform: str,
    slots: int,
    rows: int,
    width: int,
    drawn: int = 1,
) -> int:
    """Return what a program needs that reads `width` tokens of every row into a cache of `slots`,
    and draws a token after each of the last `drawn`: both are 1 in a plain decode step, and more
    where it verifies draft tokens."""
    D, F, N, H = config.hidden_size, config.ffn_hidden_size, config.num_heads, config.head_dim
    size, scheme, tokens = precision.size, precision.scheme, rows * width
    hidden = 2 * tokens * D * size  # the hidden states, and the same normalized
    layer = rows * slots * _slot(config, precision, platform)

    scores, sums, early = rows * N * width * slots, 0, 0
    if blocks := scores > SCORES:  # attention block by block
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
        copies = 1 if width == 1 or platform == "tpu" else 2 if blocks else 3
        attention = copies * scores * _FLOAT32 + layer

    at_once = min(tokens, max(1, MLP_ELEMENTS // (2 * F)))
    mlp = at_once * 2 * F * _FLOAT32 + hidden  # what is alive between the two products
    if platform == "gpu":
        mlp += 2 * F * D * size if tokens > FEW_ROWS else 0  # a copy of the weight
    elif platform == "tpu":  # what a chunk of 2048 takes in 8192 slots; shorter ones less
        sliced = scheme is not None and scheme.bits == 4  # `down`, out of the layers
        mlp = 2 * (mlp + at_once * F * size) + (F * D // 2 if sliced else 0)
    else:
        mlp += at_once * F * size + (10 * CHUNK_ELEMENTS if scheme is not None else 0)

    drawing = _DRAWING * rows * drawn * config.vocab_size * _FLOAT32
    return max(attention + hidden, mlp, drawing) + early
