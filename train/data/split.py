"""Rows taken out of a dataset, to look at and not to learn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm2_jax.errors import UsageError
from train.data.dataset import Dataset, Sample


class Subset:
    """Some sequences of a dataset, with all of it that `Batches` needs.

    Args:
        dataset: the whole.
        indices: of its sequences, ascending.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int] | np.ndarray):
        self._dataset, self._indices = dataset, np.asarray(indices, np.int64)
        self.max_length = dataset.max_length
        self.lengths = dataset.lengths[self._indices]
        self.learned = dataset.learned[self._indices]
        starts = [int(np.searchsorted(self._indices, group.start)) for group in dataset.groups]
        self.groups = [
            group._replace(start=start, stop=stop)
            for group, start, stop in zip(
                dataset.groups, starts, [*starts[1:], len(self._indices)], strict=True
            )
        ]

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> Sample:
        """A sequence, as `Dataset.sample`."""
        return self._dataset.sample(int(self._indices[index]))

    def source(self, index: int) -> str:
        """Its row, as `Dataset.source`."""
        return self._dataset.source(int(self._indices[index]))


def split(dataset: Dataset, share: float, seed: int) -> tuple[Subset, Subset]:
    """What stays to learn from, and a random share of the rows that does not.

    All sequences of a row go together, also those of a file that is given twice; general rows stay.

    Raises:
        UsageError: the share leaves one of the two without rows.
    """
    own = [g for g in dataset.groups if not g.general]
    start, stop = own[0].start, own[-1].stop
    rows: dict[int, list[int]] = {}
    for index, row in enumerate(dataset.row_ids()[start:stop].tolist(), start):
        rows.setdefault(row, []).append(index)
    count = round(len(rows) * share)
    if not 0 < count < len(rows):
        raise UsageError(
            f"--val-split {share:g} of {len(rows)} rows leaves nothing to "
            + ("look at" if count < 1 else "learn from"),
            fix="Take another share, or name a file: --val-data.",
        )
    keys = np.random.Philox(np.random.SeedSequence((seed, len(rows)))).random_raw(len(rows))
    chosen = set(np.argsort(keys, kind="stable")[:count].tolist())
    out = [i for number, row in enumerate(rows.values()) if number in chosen for i in row]
    kept = np.setdiff1d(np.arange(len(dataset)), out)
    return Subset(dataset, kept), Subset(dataset, out)
