"""Batches by their place: what step S of epoch E learns from depends on nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Container

import numpy as np

from glm2_jax.errors import InputError, UsageError
from glm2_jax.runtime.buckets import bucket
from train.data.batch import Batch
from train.data.dataset import Dataset
from train.data.plan import Plan, make_plan, steps_of
from train.data.split import Subset


class Batches:
    """The batches of a dataset.

    Every sequence of an epoch is in exactly one row. Packed rows are all as wide as the dataset's
    `max_length`; others as the smallest power of two from 64 that holds the longest of a step. The
    last step of an epoch may have empty rows.

    Args:
        dataset: what is learned from.
        batch_size: B, rows that are computed at once.
        accumulate: A, such parts of a step.
        pack: several sequences in a row.
        shuffle: random order, another one in every epoch; if not, the order of the files, and rows
            that follow each other in them do so in the batches.
        seed: of the order.
        rows: numbers below B of the rows that are wanted, the others are left empty; None = all.
    """

    def __init__(
        self,
        dataset: Dataset | Subset,
        *,
        batch_size: int,
        accumulate: int = 1,
        pack: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        rows: Container[int] | None = None,
    ):
        self.dataset = dataset
        self._wanted = range(batch_size) if rows is None else rows
        self.shape = (accumulate, batch_size)
        self.pack, self.shuffle, self.seed = pack, shuffle, seed
        self.width = dataset.max_length
        if min(self.shape) < 1 or seed < 0:
            raise UsageError("batch size and accumulation are at least 1, the seed at least 0")
        self._steps: list[int] = []  # of the epochs from the first on
        if not len(dataset):
            raise InputError("there is nothing to learn from", "the data have no row that is good")
        self._planned: tuple[int, Plan] | None = None

    def steps_per_epoch(self, epoch: int) -> int:
        """How many steps an epoch has; packed ones may differ in it."""
        return steps_of(self._plan(epoch), self.shape[0] * self.shape[1])

    def place(self, step: int) -> tuple[int, int]:
        """The epoch and the step in it of a step that is counted from the first epoch on."""
        for epoch in itertools.count():
            if epoch == len(self._steps):
                self._steps.append(self.steps_per_epoch(epoch))
            if step < self._steps[epoch]:
                return epoch, step
            step -= self._steps[epoch]
        raise AssertionError("epochs have no end")

    def at(self, epoch: int, step: int) -> tuple[Batch, list[str]]:
        """A step's arrays, [A, B, T], and "file:line" of every sequence in them, wanted or not.

        Raises:
            IndexError: the epoch has no such step. InputError: a row's file has changed.
        """
        rows, count = self._rows(epoch, step), self.shape[0] * self.shape[1]
        width = self.width
        if not self.pack:
            longest = max(int(self.dataset.lengths[row].sum()) for row in rows)
            width = bucket(longest, self.width)
        tokens, segment_ids, positions = np.zeros((3, count, width), np.int32)
        learned = np.zeros((count, width), bool)
        sources = [self.dataset.source(index) for row in rows for index in row.tolist()]
        for number, row in enumerate(rows):
            if number % self.shape[1] not in self._wanted:
                continue
            at = 0
            for segment, index in enumerate(row.tolist(), 1):
                sample = self.dataset.sample(index)
                place = slice(at, at + len(sample.ids))
                tokens[number, place] = sample.ids
                segment_ids[number, place] = segment
                positions[number, place] = np.arange(len(sample.ids))
                learned[number, place] = sample.learned
                at = place.stop
        arrays = (tokens, segment_ids, positions, learned)
        return Batch(*(array.reshape(*self.shape, width) for array in arrays)), sources

    def tokens(self, epoch: int, step: int) -> int:
        """How many tokens the sequences of a step have, wanted or not."""
        return sum(int(self.dataset.lengths[row].sum()) for row in self._rows(epoch, step))

    def _rows(self, epoch: int, step: int) -> list[np.ndarray]:
        """The sequences in each row of a step."""
        if not 0 <= step < self.steps_per_epoch(epoch):
            raise IndexError(f"epoch {epoch} has no step {step}")
        plan, count = self._plan(epoch), self.shape[0] * self.shape[1]
        return [plan.row(number) for number in range(step * count, (step + 1) * count)]

    def _plan(self, epoch: int) -> Plan:
        """The plan of an epoch; the last one is kept."""
        if self._planned is None or self._planned[0] != epoch:
            plan = make_plan(
                self.dataset.groups,
                self.dataset.lengths,
                epoch=epoch,
                seed=self.seed,
                shuffle=self.shuffle,
                pack=self.pack,
                width=self.width,
                rows_per_step=self.shape[0] * self.shape[1],
            )
            self._planned = (epoch, plan)
        return self._planned[1]
