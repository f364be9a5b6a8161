"""Which sequences an epoch has, in which order, and in which rows they stand.

All of it is a pure function of the lengths, the seed and the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glm2_jax.runtime.buckets import bucket
from train.data.dataset import Group

_WINDOW = 32  # steps whose sequences are sorted by length together


class Plan(NamedTuple):
    """The rows of an epoch.

    Attributes:
        items: int64 [N], sequences in the order in which they stand in the rows.
        starts: int64 [rows + 1], where each row begins in `items`.
    """

    items: np.ndarray
    starts: np.ndarray

    def row(self, number: int) -> np.ndarray:
        """The sequences of a row; none beyond the last."""
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
    """Plans an epoch.

    Args:
        groups: the files' sequences and their weights.
        lengths: int32 [N] of all sequences.
        epoch, seed: what random order depends on.
        shuffle: random order; if not, that of the files, and rows are filled one after another.
        pack: several sequences in a row of `width` tokens; if not, one.
        width: most tokens of a row.
        rows_per_step: rows that are computed together.
    """
    items = epoch_items(groups, epoch=epoch, seed=seed, shuffle=shuffle)
    if pack:
        fit = first_fit if shuffle else next_fit
        rows = fit(lengths[items], width)
        if shuffle:  # the rows that are begun last are the emptiest, and hold the longest sequences
            rows = random_order(rows.max() + 1, seed, epoch, 1)[rows]
        # A stable sort by row keeps the order inside each.
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
        return Plan(items[np.argsort(rows, kind="stable")], starts)
    if shuffle:
        items = _alike_together(items, lengths, rows_per_step, width, (seed, epoch, 1))
    return Plan(items, np.arange(len(items) + 1))


def epoch_items(groups: Sequence[Group], *, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
    """int64: the sequences of an epoch in their order.

    A weight of 2.5 gives every sequence of a file twice, and half of them once more: others in
    every epoch. Without shuffling files come one after another, and general rows stand evenly
    between them.
    """
    parts = []
    for number, group in enumerate(groups):
        n = group.stop - group.start
        whole, rest = divmod(max(round(n * group.weight), 1), max(n, 1))
        if shuffle:
            extra = np.sort(random_order(n, seed, epoch, 2 + number)[:rest])
        else:
            extra = (epoch * rest + np.arange(rest)) % max(n, 1)
        parts.append(group.start + np.concatenate([np.tile(np.arange(n), whole), extra]))
    if shuffle:
        items = np.concatenate(parts)
        return items[random_order(len(items), seed, epoch, 0)]
    own = [part for part, group in zip(parts, groups, strict=True) if not group.general]
    general = [part for part, group in zip(parts, groups, strict=True) if group.general]
    return _between(np.concatenate(own), np.concatenate([np.zeros(0, np.int64), *general]))


def first_fit(lengths: np.ndarray, width: int) -> np.ndarray:
    """int64 [N]: the row of each sequence: the first that has room for it, in their order.

    A tree over the rows' room, whose nodes hold the most of any row below, finds it in
    logarithmic time.
    """
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
    """int64 [N]: the row of each sequence: the last one begun, or a new one. Order is kept."""
    rows = np.empty(len(lengths), np.int64)
    row, room = 0, width
    for item, length in enumerate(lengths.tolist()):
        if length > room:
            row, room = row + 1, width
        rows[item] = row
        room -= length
    return rows


def _alike_together(items, lengths, size: int, width: int, seeds: tuple[int, ...]) -> np.ndarray:
    """Groups sequences of similar length into the same steps, and puts the steps in random order.

    Only the sequences of `_WINDOW` steps are sorted together, so that a step holds no more than
    chance made neighbors. An incomplete step stays the last: chance chooses its sequences before
    anything is sorted, because each of them counts more than one of a full step.
    """
    steps = len(items) // size
    items, rest = items[: steps * size], items[steps * size :]
    classes = np.array([bucket(length, width) for length in lengths[items].tolist()], np.int64)
    windows = np.arange(len(items)) // (_WINDOW * size)
    grouped = items[np.lexsort((classes, windows))].reshape(steps, size)
    return np.concatenate([grouped[random_order(steps, *seeds)].reshape(-1), rest])


def _between(own: np.ndarray, general: np.ndarray) -> np.ndarray:
    """Both in their order, the general ones at even distances."""
    places = [(np.arange(len(part)) + 0.5) / max(len(part), 1) for part in (own, general)]
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate([own, general])[order]


def steps_of(plan: Plan, rows_per_step: int) -> int:
    """The number of steps that take all rows of a plan."""
    return math.ceil((len(plan.starts) - 1) / rows_per_step)


def random_order(count: int, *seeds: int) -> np.ndarray:
    """int64: 0 to count - 1 in a random order.

    It is made from raw Philox bits, which are the same in every version of NumPy, unlike what
    `np.random.Generator` makes of them.

    Args:
        count: how many.
        seeds: whole numbers of 0 or more, always as many; others give another order.
    """
    bits = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(bits, kind="stable")
