"""What the rows of a dataset hold: repetitions, diversity, languages, and what two sets share."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from glm2_jax.cli.messages import Progress
from glm2_jax.datasets import TEXT
from train.data.dataset import Dataset
from train.data.duplicates import Dialogues, normalized, repeats, signature_of
from train.data.language import language_of, units

SIDES = {"user": "questions", "assistant": "answers", TEXT: "texts"}
SAMPLE = 10_000  # rows whose n-grams are counted


class Distinct:
    """The n-grams of some texts, n = 1 and 2, of Chinese characters and words."""

    def __init__(self):
        self._seen: tuple[set[int], set[int]] = (set(), set())
        self._total = [0, 0]

    def add(self, text: str) -> None:
        """Count the n-grams of a text."""
        found = units(text)
        for n, grams in enumerate((found, list(zip(found, found[1:], strict=False)))):
            self._seen[n].update(map(hash, grams))
            self._total[n] += len(grams)

    def shares(self) -> list[float]:
        """Return for each n which share of the n-grams are different ones, 0 to 1."""
        pairs = zip(self._seen, self._total, strict=True)
        return [len(seen) / total if total else 0.0 for seen, total in pairs]


@dataclass
class Figures:
    """Figures of the rows of a dataset; arrays have a value for each row."""

    firsts: np.ndarray  # int64 [R], the first sequence of the row
    ids: np.ndarray  # int64 [R], as `Dataset.row_ids`
    origins: np.ndarray  # uint64 [R], as `Dataset.origins`
    questions: np.ndarray  # uint64 [R], hashes of the user's texts, normalized
    texts: np.ndarray  # uint64 [R], hashes of all texts, normalized
    signatures: np.ndarray  # uint32 [R, 64], of all texts
    # rows, and rows that begin with all of them
    growing: list[tuple[int, int]] = field(default_factory=list)
    languages: dict[str, Counter[str]] = field(default_factory=dict)  # of the texts of SIDES
    distinct: dict[str, Distinct] = field(default_factory=dict)  # likewise

    def only(self, ids: np.ndarray) -> Figures:
        """Return the arrays of the rows with these ids, which ascend as their sequences do; the
        other figures stay those of all."""
        kept = np.isin(self.ids, ids)
        names = ("firsts", "ids", "origins", "questions", "texts", "signatures")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})


def gather(dataset: Dataset) -> Figures:
    """Read all rows of a dataset once."""
    firsts = dataset.first_of_rows()
    found = Figures(
        firsts=firsts,
        ids=dataset.row_ids()[firsts],
        origins=dataset.origins()[firsts],
        questions=np.zeros(len(firsts), np.uint64),
        texts=np.zeros(len(firsts), np.uint64),
        signatures=np.zeros((len(firsts), 64), np.uint32),
    )
    dialogues, step = Dialogues(), -(-len(firsts) // SAMPLE)
    with Progress("comparing rows", len(firsts)) as bar:
        for number, index in enumerate(firsts.tolist()):
            messages = dataset.messages(index)
            dialogues.add(messages)
            normal = [(x["role"], normalized(x["content"])) for x in messages]
            texts = [text for _, text in normal]
            found.signatures[number] = signature_of("".join(texts))
            found.texts[number] = _hash(texts)
            found.questions[number] = _hash([text for role, text in normal if role == "user"])
            for role, side in SIDES.items():
                if text := "\n".join(x["content"] for x in messages if x["role"] == role):
                    found.languages.setdefault(side, Counter())[language_of(text)] += 1
                    if number % step == 0:
                        found.distinct.setdefault(side, Distinct()).add(text)
            bar(number + 1)
    found.growing = dialogues.growing()
    return found


def _hash(texts: list[str]) -> int:
    """Return a hash of texts; 0 of none."""
    data = "\n".join(texts).encode("utf-8", "replace")
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little") if texts else 0


SHARED = {
    "repeats": "word for word", "has the question of": "with another answer",
    "has the origin of": "in other words of the same origin", "nearly repeats": "nearly",
}  # fmt: skip
"""How a row of validation is like one of training, and how it is there."""


class Shared(NamedTuple):
    """A validation row that is in training, too: how, and the numbers of both rows."""

    how: str
    row: int
    learned: int


def shared(learned: Figures, validation: Figures) -> list[Shared]:
    """Return the validation rows that training has, too, each once, by the closest likeness."""
    exact, asked, origin, near = SHARED
    found: dict[int, Shared] = {}
    for how, name in ((exact, "texts"), (asked, "questions"), (origin, "origins")):
        one, other = getattr(learned, name), getattr(validation, name)
        values, first = np.unique(one, return_index=True)
        for row in np.flatnonzero(np.isin(other, values[values != 0])).tolist():
            place = int(first[np.searchsorted(values, other[row])])
            found.setdefault(row, Shared(how, row, place))
    count = len(learned.signatures)
    nearly = repeats(np.concatenate([learned.signatures, validation.signatures]))[count:]
    for row in np.flatnonzero(nearly < count).tolist():
        found.setdefault(row, Shared(near, row, int(nearly[row])))
    return [found[row] for row in sorted(found)]
