"""Plain texts as token sequences, in overlapping windows where they are long.

A text follows the ids of a prompt without text, and its end token follows it. Each of its tokens
counts once, in the first window that has it; those that a window repeats are its context.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from glm2_jax.errors import UsageError
from glm2_jax.text.tokenizer import Tokenizer

_KEPT = 2**24  # tokens of texts that are not encoded again


class Span(NamedTuple):
    """The tokens of a window: those from `start` are read, those from `new` count."""

    start: int
    new: int
    end: int


def spans(total: int, room: int, stride: int) -> Iterator[Span]:
    """Cut `total` tokens into windows of at most `room`, which start `stride` tokens apart."""
    done = 0
    while done < total:
        end = min(done + (stride if done else room), total)
        yield Span(max(end - room, 0), done, end)
        done = end


class Texts:
    """Encodes texts as sequences of at most `length` tokens, which start `stride` tokens apart;
    None = as many as a sequence has of the text, so that they do not overlap.

    UsageError: a sequence has no room for a text, or the stride is longer than it.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, stride: int | None = None):
        self._tokenizer, self._start = tokenizer, tokenizer.start_ids
        self.room = length - len(self._start)
        if self.room < 2:
            raise UsageError(
                f"--max-length must be at least {len(self._start) + 2} with --format text, "
                f"got {length}."
            )
        self.stride = self.room if stride is None else stride
        if self.stride > self.room:
            raise UsageError(
                f"--stride must be at most {self.room}, got {stride}.",
                f"A sequence has {self.room} tokens of the text: --max-length without the "
                f"{len(self._start)} that it begins with. The others would be left out.",
            )
        self._known: OrderedDict[tuple[str, bool], np.ndarray] = OrderedDict()
        self._held = 0  # tokens of all of them

    def count(self, text: str, ends: bool) -> int:
        """Return the number of sequences of a text; `ends` = an end token follows it."""
        return sum(1 for _ in spans(len(self._ids(text, ends)), self.room, self.stride))

    def encode(self, text: str, ends: bool, number: int) -> tuple[list[int], list[bool]]:
        """Return the ids of one of the sequences, and which of them count."""
        ids = self._ids(text, ends)
        start, new, end = list(spans(len(ids), self.room, self.stride))[number]
        context = len(self._start) + new - start
        learned = [False] * context + [True] * (end - new)
        learned[0] = False  # nothing comes before it
        return [*self._start, *ids[start:end].tolist()], learned

    def _ids(self, text: str, ends: bool) -> np.ndarray:
        """Return int32 [N], also of a text that was encoded before."""
        key = text, ends
        if key in self._known:
            self._known.move_to_end(key)
        else:
            ids = [*self._tokenizer.encode(text), *[self._tokenizer.eos_id] * ends]
            self._known[key] = np.array(ids, np.int32)
            self._held += len(ids)
            while len(self._known) > 1 and self._held > _KEPT:
                self._held -= len(self._known.popitem(last=False)[1])
        return self._known[key]
