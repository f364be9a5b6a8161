"""Prompt-lookup speculative decoding: draft tokens from the text itself, without a second model.

Each row looks up where its last tokens occurred before, and drafts what followed there. One forward
pass (`steps.verify`) draws a token after every draft token, as it would be drawn without a draft,
with the same random numbers; as long as it is the draft token, the next one counts, too. So the
answers are those of plain steps. Only rounding differs: a product of several tokens may be summed
in another order, so a narrow dtype like bfloat16 may choose otherwise between two near equals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from infer.engine.rows import TokenEvent

LONGEST_MATCH = 3  # tokens at the end of the text that are looked up; fewer if they are new


class Text:
    """The tokens of a row so far, and where each short sequence of them came last.

    A token costs a few entries of a dictionary, and a draft a few look-ups, whatever the length.
    """

    def __init__(self, ids: Iterable[int]):
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the place that followed it
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        place = len(self._ids)
        for size in range(1, min(LONGEST_MATCH, place) + 1):
            self._after[tuple(self._ids[-size:])] = place
        self._ids.append(token)

    def draft(self, count: int) -> list[int] | None:
        """Return what followed the longest end of the text that had occurred before; None if none
        had. If too little followed, the draft repeats it."""
        ends = (tuple(self._ids[-size:]) for size in range(LONGEST_MATCH, 0, -1))
        place = next((self._after[end] for end in ends if end in self._after), None)
        if place is None:
            return None
        copied = self._ids[place:][:count]
        return [copied[index % len(copied)] for index in range(count)]


class Drafts:
    """Drafts `count` tokens for every row of a call."""

    def __init__(self, prompts: Sequence[Sequence[int]], count: int):
        self._texts = [Text(ids) for ids in prompts]
        self._count = count

    def push(self, events: Iterable[TokenEvent]) -> None:
        """Append the tokens of a step."""
        for event in events:
            if event.token is not None:
                self._texts[event.row].push(event.token)

    def next(self, keep: np.ndarray) -> np.ndarray | None:
        """Return the drafts of the rows that have not ended, bool [B], as `drafts_of`."""
        texts = [self._texts[row] if kept else None for row, kept in enumerate(keep)]
        return drafts_of(texts, self._count)


def drafts_of(texts: Iterable[Text | None], count: int) -> np.ndarray | None:
    """Return int32 [B, N], zeros for rows without a draft; None if no row has one."""
    drafts = [None if text is None else text.draft(count) for text in texts]
    if not any(drafts):
        return None
    return np.array([draft or [0] * count for draft in drafts], np.int32)
