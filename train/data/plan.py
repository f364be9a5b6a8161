"""Which sequences are for validation, and those of an epoch: their order, and their rows.

All of it is a pure function of the lengths, the seed and the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glm2_jax.errors import UsageError
from glm2_jax.runtime.buckets import bucket
from train.data.dataset import Dataset, Group

_WINDOW = 32  # steps whose sequences are sorted by length together


def split(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return the rows to learn from, and a random share of the rows for validation; UsageError if
    one of the two has none.

    All sequences of a row stay together, also those of a file that is given twice, and all rows of
    one origin; general rows are never taken for validation.
    """
    own = max(group.stop for group in dataset.groups if not group.general)
    ids = dataset.origin_ids()
    rows = ids[np.sort(np.unique(ids[:own], return_index=True)[1])]  # in the order of the files
    count = round(len(rows) * share)
    if not 0 < count < len(rows):
        raise UsageError(
            f"--val-split {share:g} of {len(rows)} rows leaves none for "
            + ("validation." if count < 1 else "training."),
            fix="Choose another share, or name a file: --val-data FILE.",
        )
    chosen = np.isin(ids, rows[random_order(len(rows), seed, len(rows))[:count]])
    chosen[own:] = False
    return dataset.subset(np.flatnonzero(~chosen)), dataset.subset(np.flatnonzero(chosen))


class Plan(NamedTuple):
    """The rows of an epoch."""

    items: np.ndarray  # int64 [N], sequences in the order in which they stand in the rows
    starts: np.ndarray  # int64 [rows + 1], where each row begins in `items`

    def row(self, number: int) -> np.ndarray:
        """Return the sequences of a row; none after the last row."""
        if number >= len(self.starts) - 1:
            return self.items[:0]
        return self.items[self.starts[number] : self.starts[number + 1]]


def make_plan(
    groups: Sequence[Group],
    lengths: np.ndarray,
    *,
    epoch: int,
    seed: int,
    shuffle: bool,
    pack: bool,
    width: int,
    rows_per_step: int,
) -> Plan:
    """Plan the rows of an epoch, of at most `width` tokens each; `lengths` is int32 [N].

    With `pack` a row holds several sequences. Without `shuffle` the order is that of the files, and
    one row is filled after the other.
    """
    items = epoch_items(groups, epoch=epoch, seed=seed, shuffle=shuffle)
    if pack:
        rows = (first_fit if shuffle else next_fit)(lengths[items], width)
        if shuffle:  # the last rows are the emptiest, and hold the longest sequences
            rows = random_order(rows.max() + 1, seed, epoch, 1)[rows]
        # A stable sort by row keeps the order inside each.
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
        return Plan(items[np.argsort(rows, kind="stable")], starts)
    if shuffle:
        items = _group_by_length(items, lengths, rows_per_step, width, (seed, epoch, 1))
    return Plan(items, np.arange(len(items) + 1))


def epoch_items(groups: Sequence[Group], *, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
    """Return int64: the sequences of an epoch in their order.

    A weight of 2.5 takes every sequence of a file twice, and half of them once more, different ones
    in every epoch. Without shuffling, general rows are spread evenly between those of the files.
    """
    own, general = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, group in enumerate(groups):
        n = group.stop - group.start
        times, rest = divmod(max(round(n * group.weight), 1), max(n, 1))
        if shuffle:
            extra = np.sort(random_order(n, seed, epoch, 2 + number)[:rest])
        else:
            extra = (epoch * rest + np.arange(rest)) % max(n, 1)
        part = group.start + np.concatenate([np.tile(np.arange(n), times), extra])
        (general if group.general else own).append(part)
    merged = [np.concatenate(own), np.concatenate(general)]
    items = np.concatenate(merged)
    if shuffle:
        return items[random_order(len(items), seed, epoch, 0)]
    places = [(np.arange(len(part)) + 0.5) / max(len(part), 1) for part in merged]
    return items[np.argsort(np.concatenate(places), kind="stable")]


def first_fit(lengths: np.ndarray, width: int) -> np.ndarray:
    """Return int64 [N]: for each sequence in turn the first row that has room for it, found in a
    tree over the free room of the rows, whose nodes hold the most of any row below."""
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [width] * (2 * leaves)
    rows = np.empty(len(lengths), np.int64)
    for item, length in enumerate(lengths.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < length
        rows[item] = node - leaves
        room[node] -= length
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def next_fit(lengths: np.ndarray, width: int) -> np.ndarray:
    """Return int64 [N]: the row of each sequence, the current one or a new one, in order."""
    rows = np.empty(len(lengths), np.int64)
    row, room = 0, width
    for item, length in enumerate(lengths.tolist()):
        if length > room:
            row, room = row + 1, width
        rows[item] = row
        room -= length
    return rows


def _group_by_length(items, lengths, size: int, width: int, seeds: tuple[int, ...]) -> np.ndarray:
    """Put sequences of similar length into the same steps, and the steps into random order.

    Only the sequences of `_WINDOW` steps are sorted together, so that a step holds little more than
    sequences that were neighbors by chance. An incomplete step stays the last: its sequences are
    chosen before anything is sorted, because each of them counts more than one of a full step.
    """
    steps = len(items) // size
    items, rest = items[: steps * size], items[steps * size :]
    classes = np.array([bucket(length, width) for length in lengths[items].tolist()], np.int64)
    windows = np.arange(len(items)) // (_WINDOW * size)
    grouped = items[np.lexsort((classes, windows))].reshape(steps, size)
    return np.concatenate([grouped[random_order(steps, *seeds)].reshape(-1), rest])


def random_order(count: int, *seeds: int) -> np.ndarray:
    """Return int64: 0 to count - 1 in a random order that depends on the seeds (0 or more)."""
    # Raw bits are the same in every version of NumPy, unlike what `np.random.Generator` makes.
    bits = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(bits, kind="stable")
