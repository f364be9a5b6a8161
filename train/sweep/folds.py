"""Cross-validation: which rows are left out of the training of each fold."""

from __future__ import annotations

import numpy as np

from glm2_jax.errors import UsageError
from train.data.dataset import Dataset
from train.data.plan import random_order


def split_fold(dataset: Dataset, fold: int, folds: int, seed: int) -> tuple[Dataset, Dataset]:
    """Return the rows to learn from, and those of a fold, from 0, for validation.

    The folds have no row in common, together have all of them, and each has as many rows of every
    file as the others, give or take one. All sequences of a row stay together, and all rows of one
    origin, which count as one; general rows are never taken for validation. UsageError where there
    are fewer rows than folds.
    """
    own = max(group.stop for group in dataset.groups if not group.general)
    ids = dataset.origin_ids()
    rows = ids[np.sort(np.unique(ids[:own], return_index=True)[1])]
    if len(rows) < folds:
        raise UsageError(
            f"--folds {folds} of {len(rows)} rows leaves a fold without rows.",
            fix=f"Choose at most {len(rows)} folds, or add rows.",
        )
    rows = rows[random_order(len(rows), seed, folds)]
    rows = rows[np.argsort(rows >> 40, kind="stable")]  # by their files
    chosen = np.isin(ids, rows[fold::folds])
    chosen[own:] = False
    return dataset.subset(np.flatnonzero(~chosen)), dataset.subset(np.flatnonzero(chosen))
