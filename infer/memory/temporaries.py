"""What the programs need on the device besides weights and cache: a formula.

It adds up the large arrays that are alive together at the worst moment, as XLA lays them out; tests
compare it with what XLA reports of the compiled programs. All sizes are bytes.
B rows, T tokens of each that are read at once, S slots of the cache. A step that verifies draft
tokens reads several tokens of a row, its columns, and draws a token after each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    slot = rows * Program(*form, 1, 1, 1).slot * config.num_layers
    most = 0
    for size in (*(1 << power for power in range(6, (slots - 1).bit_length())), slots):
        prompt = min(max(1, chunk // rows), size)
        for width, drawn in ((plan.columns, plan.columns), (prompt, 1)):
            program = Program(*form, plan.prefix + size, rows, width, drawn)
            most = max(most, program.bytes - (slots - size) * slot)
    # The cache grows by copying a smaller one: at most the bucket before it, where the model's
    # context ends the growth early.
    smaller = 1 << ((max(slots, 2) - 1).bit_length() - 1)
    return max(most, (smaller + plan.prefix) * slot)


@dataclass(frozen=True)
class Program:
    """A program that reads `width` tokens of every row, 1 in a plain decode step, and draws a token
    after each of the last `drawn`."""

    config: GLMConfig
    precision: Precision
    platform: str
    slots: int
    rows: int
    width: int
    drawn: int = 1

    @property
    def bytes(self) -> int:
        drawing = _DRAWING * self.rows * self.drawn * self.config.vocab_size * _FLOAT32
        return max(self._attention(), self._mlp(), drawing) + self._early()

    @property
    def slot(self) -> int:
        """Keys and values of one token in one layer."""
        number = self.precision.cache_size(self.platform)
        return 2 * self.config.num_kv_heads * self.config.head_dim * number

    @property
    def _scores(self) -> int:
        return self.rows * self.config.num_heads * self.width * self.slots

    @property
    def _queries(self) -> int:
        """Queries of a block of attention."""
        return min(self.width, max(1, SCORES // (self.rows * self.config.num_heads * KEYS)))

    @property
    def _added(self) -> int:
        """What attention over blocks of keys adds up for a query."""
        return self.config.num_heads * (self.config.head_dim + 2) * _FLOAT32

    @property
    def _hidden(self) -> int:
        """The hidden states, and the same normalized."""
        return 2 * self.rows * self.width * self.config.hidden_size * self.precision.size

    def _attention(self) -> int:
        """Scores, a layer's keys and values, and the hidden states with them."""
        scores, sums = self._scores, 0
        if blocks := scores > SCORES:
            scores = self.rows * self.config.num_heads * self._queries * min(KEYS, self.slots)
            sums = self.rows * self._queries * self._added
        layer = self.rows * self.slots * self.slot
        if self.platform == "gpu":
            if self.rows == self.width == 1:  # both keys and values are copied out of the cache
                return scores * _FLOAT32 + layer + self._hidden
            # Keys are read in place; probabilities are rounded for the product with values.
            size = _FLOAT32 + self.precision.size
            return scores * size + layer // 2 + sums + self._hidden
        one = self.width == 1 or self.platform == "tpu"
        copies = 1 if one else 2 if blocks else 3
        return copies * scores * _FLOAT32 + layer + self._hidden

    def _mlp(self) -> int:
        """Return what is alive between the two products; on a GPU with a copy of the weight."""
        D, F = self.config.hidden_size, self.config.ffn_hidden_size
        scheme, tokens = self.precision.scheme, self.rows * self.width
        at_once = min(tokens, max(1, MLP_ELEMENTS // (2 * F)))
        between = at_once * 2 * F * _FLOAT32 + self._hidden
        if self.platform == "gpu":
            return between + (2 * F * D * self.precision.size if tokens > FEW_ROWS else 0)
        between += at_once * F * self.precision.size
        if self.platform == "tpu":  # what a chunk of 2048 takes in 8192 slots; shorter ones less
            sliced = scheme is not None and scheme.bits == 4  # `down`, out of the layers
            return 2 * between + (F * D // 2 if sliced else 0)
        return between + (10 * CHUNK_ELEMENTS if scheme is not None else 0)

    def _early(self) -> int:
        """Results of attention block by block: with a list of layers, XLA:CPU allocates them for
        all layers at the beginning."""
        if self.platform != "cpu" or self._scores <= SCORES:
            return 0
        result = self._added  # or its result, where blocks of queries follow each other
        if self._queries < self.width:
            result = self.config.num_heads * self.config.head_dim * self.precision.size
        return self.config.num_layers * self.rows * self.width * result
