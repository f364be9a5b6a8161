"""Several tokens from one forward pass, without a second model: drafts from the text itself.

What an answer says next has often been said before: in a quotation, a list, a program that is
edited. So each row looks up where its last tokens occurred, and what followed there is the draft of
what follows now. One forward pass computes the logits after every token of the draft, and at each
of them a token is drawn as it would be without a draft, with the same random numbers. As long as
the token drawn is the one that was drafted, the logits of the next place are those that the next
step would have computed, so its token counts, too; the cache is then cut back to what counts.
Where no row finds a draft, a plain step is taken.

So the answers are those of plain steps, drawn from the same distribution, whatever the drafts.
(A draft that is always the same is accepted with the probability that the model gives it, which is
what speculative sampling asks for.) Only rounding is not the same: products of several tokens may
add up in another order than those of one, so where two tokens are as good as equally likely, a
narrow type like bfloat16 may take the other one. B rows, N tokens of a draft, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from infer.engine.rows import TokenEvent

LONGEST_MATCH = 3  # tokens at the end of the text that are looked up, less where they are new


class Text:
    """The tokens of a row so far, and where each short sequence of them came last.

    It costs a few entries of a dictionary a token, and a draft a few look-ups, whatever the length.
    """

    def __init__(self, ids: Iterable[int]):
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the place that followed it
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Takes the next token."""
        place = len(self._ids)
        for size in range(1, min(LONGEST_MATCH, place) + 1):
            self._after[tuple(self._ids[-size:])] = place
        self._ids.append(token)

    def draft(self, count: int) -> list[int] | None:
        """What followed the longest end of the text that was there before; None where none was. A
        text that ends too soon goes on with the draft's own beginning."""
        ends = (tuple(self._ids[-size:]) for size in range(LONGEST_MATCH, 0, -1))
        place = next((self._after[end] for end in ends if end in self._after), None)
        if place is None:
            return None
        copied = self._ids[place:][:count]
        return [copied[index % len(copied)] for index in range(count)]


class Drafts:
    """The drafts of every row of a call, `count` tokens each."""

    def __init__(self, prompts: Sequence[Sequence[int]], count: int):
        self._texts = [Text(ids) for ids in prompts]
        self._count = count

    def push(self, events: Iterable[TokenEvent]) -> None:
        """Takes the tokens that came."""
        for event in events:
            if event.token is not None:
                self._texts[event.row].push(event.token)

    def next(self, keep: np.ndarray) -> np.ndarray | None:
        """int32 [B, N], zeros for rows without a draft; None where no row has one.

        Args:
          keep: bool [B], the rows that go on.
        """
        found = {row: self._texts[row].draft(self._count) for row in np.flatnonzero(keep)}
        found = {row: draft for row, draft in found.items() if draft is not None}
        if not found:
            return None
        drafts = np.zeros((keep.size, self._count), np.int32)
        for row, draft in found.items():
            drafts[row] = draft
        return drafts
