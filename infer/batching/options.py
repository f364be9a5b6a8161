"""The shapes of continuous batching. Nothing here imports jax."""

from __future__ import annotations

from dataclasses import dataclass

from glm2_jax.runtime.buckets import SMALLEST_BUCKET

SMALLEST_VIEW = 512  # slots
TOKENS_PER_PREFILL = 256
# There, reading 64 tokens takes as long as a step of many rows.
TOKENS_PER_PREFILL_ON_CPU = 64


@dataclass(frozen=True)
class BatchOptions:
    """How many sequences are answered at once, and in which shapes.

    All programs follow from these numbers, so that all can be compiled ahead.

    Attributes:
        slots: B, the rows of the cache; each step computes all of them.
        size: S, the most tokens of a prompt and its answer together.
        tokens_per_prefill: how many tokens of prompts are read between two steps of decoding.
        queue: how many jobs may wait.
        deterministic: compute every row in shapes that do not depend on the others, and reuse only
            what was computed in them. A row's numbers are then the same to the last bit alone and
            among others; but prompts are read one at a time, and all slots of a row in each step.
        eager: fill all slots before any row decodes: fastest if no user waits for the next token.
        whole: read every prompt in one piece, however long it is, and reuse nothing: each of its
            tokens may see all others.
    """

    slots: int
    size: int
    tokens_per_prefill: int = TOKENS_PER_PREFILL
    queue: int = 1024
    deterministic: bool = False
    eager: bool = False
    whole: bool = False

    @property
    def budget(self) -> int:
        """The tokens of one prefill, R x T; a `whole` prompt may have more."""
        return min(self.tokens_per_prefill, self.size)

    @property
    def widths(self) -> tuple[int, ...]:
        """T of the prefills."""
        largest = self.size if self.whole else self.budget
        return (*_doubled(SMALLEST_BUCKET, largest), largest)

    @property
    def views(self) -> tuple[int, ...]:
        """How many slots a program reads: as many as the longest row needs."""
        return (
            (self.size,) if self.deterministic else (*_doubled(SMALLEST_VIEW, self.size), self.size)
        )


def _doubled(first: int, below: int) -> list[int]:
    sizes = []
    while first < below:
        sizes.append(first)
        first *= 2
    return sizes
