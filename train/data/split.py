"""Validation rows taken out of a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm2_jax.errors import UsageError
from train.data.dataset import Dataset, Sample
from train.data.plan import random_order


class Subset:
    """Some sequences of a dataset, with all that `Batches` needs.

    Args:
        dataset: the complete dataset.
        indices: of its sequences, ascending.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int] | np.ndarray):
        self._dataset, self._indices = dataset, np.asarray(indices, np.int64)
        self.max_length = dataset.max_length
        self.lengths = dataset.lengths[self._indices]
        self.learned = dataset.learned[self._indices]
        edges = [group.start for group in dataset.groups] + [len(dataset)]
        edges = np.searchsorted(self._indices, edges).tolist()
        self.groups = [
            group._replace(start=start, stop=stop)
            for group, start, stop in zip(dataset.groups, edges, edges[1:], strict=False)
        ]

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> Sample:
        """Return a sequence, as `Dataset.sample` does."""
        return self._dataset.sample(int(self._indices[index]))

    def source(self, index: int) -> str:
        """Return where its row is, as `Dataset.source` does."""
        return self._dataset.source(int(self._indices[index]))


def split(dataset: Dataset, share: float, seed: int) -> tuple[Subset, Subset]:
    """Return the rows to learn from, and a random share of the rows for validation.

    All sequences of a row stay together, also those of a file that is given twice; general rows are
    never taken for validation.

    Raises:
        UsageError: the share leaves one of the two without rows.
    """
    own = [group for group in dataset.groups if not group.general]
    start, stop = own[0].start, own[-1].stop
    rows: dict[int, list[int]] = {}
    for index, row in enumerate(dataset.row_ids()[start:stop].tolist(), start):
        rows.setdefault(row, []).append(index)
    count = round(len(rows) * share)
    if not 0 < count < len(rows):
        raise UsageError(
            f"--val-split {share:g} of {len(rows)} rows leaves none for "
            + ("validation." if count < 1 else "training."),
            fix="Choose another share, or name a file: --val-data FILE.",
        )
    chosen = set(random_order(len(rows), seed, len(rows))[:count].tolist())
    out = [i for number, row in enumerate(rows.values()) if number in chosen for i in row]
    kept = np.setdiff1d(np.arange(len(dataset)), out)
    return Subset(dataset, kept), Subset(dataset, out)
