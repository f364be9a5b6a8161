"""What a model's new wording of a question must be like to be kept. Imports no jax."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from train.augment.spans import names, numbers
from train.data.duplicates import Seen, signature
from train.data.language import language_of


def similarity(one: str, other: str) -> float:
    """Return how alike two texts are, 0 to 1: the share of their pairs of neighboring characters
    that they have in common (the Dice coefficient), without case, spaces and punctuation."""
    counts = [_pairs(text) for text in (one, other)]
    total = sum(count.total() for count in counts)
    return 2 * (counts[0] & counts[1]).total() / total if total else float(one == other)


def _pairs(text: str) -> Counter[str]:
    plain = "".join(char for char in text.casefold() if char.isalnum())
    return Counter(plain[at : at + 2] for at in range(max(len(plain) - 1, 1)))


class Checker:
    """Refuses wordings that ask for something else, or that are there already.

    `low` and `high` bound `similarity` to the old wording. `known` are the questions of all rows.
    """

    def __init__(self, low: float, high: float, known: Iterable[str]):
        self.low, self.high, self._seen = low, high, Seen()
        for text in known:
            self._seen.add(signature(text))

    def reason(self, old: str, new: str) -> str:
        """Return why a new wording is refused; "" where it is kept, and known from now on."""
        if not new:
            return "empty"
        if language_of(old) != language_of(new):
            return "other language"
        if numbers(old) != numbers(new):
            return "other numbers"
        lower = old.casefold(), new.casefold()
        if not all(name in lower[1] for name in names(old)) or not all(
            name in lower[0] for name in names(new)
        ):
            return "other names"
        if (alike := similarity(old, new)) < self.low:
            return "too different"
        if alike > self.high:
            return "too similar"
        if self._seen.has(new_signature := signature(new)):
            return "near-duplicate"
        self._seen.add(new_signature)
        return ""
