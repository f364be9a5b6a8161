"""Batches addressed by epoch and step: nothing else decides what a step learns from."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator
from typing import NamedTuple

import jax

from glm2_jax.runtime.buckets import bucket
from train.data.batch import Batch, make_batch
from train.data.dataset import Dataset
from train.data.plan import Plan, make_plan


class Step(NamedTuple):
    """The data of one optimizer step."""

    batch: Batch  # arrays [A, B, T]
    sources: list[str]  # "file:line" of every sequence, also of rows that other processes compute
    tokens: int  # how many tokens these sequences have


class Batches:
    """The batches of a dataset: A = `accumulate` micro-batches of B = `batch_size` rows per step.

    Every sequence of an epoch is in exactly one row. Packed rows are as wide as the dataset's
    `width`; others as the smallest power of two from 64 that holds the longest row of the
    step. The last step of an epoch may have empty rows. `rows` are the numbers below B of the rows
    to fill, the others are left empty; None = all.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        accumulate: int = 1,
        pack: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        rows: Container[int] | None = None,
    ):
        self.dataset, self.pack, self._shuffle, self._seed = dataset, pack, shuffle, seed
        self.shape = (accumulate, batch_size)
        self._wanted = range(batch_size) if rows is None else rows
        self._rows_per_step = accumulate * batch_size
        self._planned: tuple[int, Plan] | None = None

    @property
    def width(self) -> int:
        """The most tokens that a row has, with padding."""
        limit = self.dataset.width
        return limit if self.pack else bucket(int(max(self.dataset.lengths)), limit)

    def steps_per_epoch(self, epoch: int) -> int:
        """Return the number of steps of an epoch; with packing, epochs may differ."""
        return -(-(len(self._plan(epoch).starts) - 1) // self._rows_per_step)

    def places(self, step: int) -> Iterator[tuple[int, int]]:
        """Yield the epoch of each step from `step` of the run on, and its number in the epoch."""
        for epoch in itertools.count():
            steps = self.steps_per_epoch(epoch)
            yield from ((epoch, number) for number in range(step, steps))
            step = max(step - steps, 0)

    def at(self, epoch: int, step: int) -> Step:
        """Return the data of a step; InputError where a row has changed in its file."""
        plan, count, size = self._plan(epoch), self._rows_per_step, self.shape[1]
        rows = [plan.row(number) for number in range(step * count, (step + 1) * count)]
        lengths = [int(self.dataset.lengths[row].sum()) for row in rows]
        limit = self.dataset.width
        width = limit if self.pack else bucket(max(lengths), limit)
        filled = [row if n % size in self._wanted else row[:0] for n, row in enumerate(rows)]
        samples = [
            [sample for index in row.tolist() for sample in self.dataset.samples(index)]
            for row in filled
        ]
        flat = make_batch(samples, width)
        batch = jax.tree.map(lambda x: x.reshape(*self.shape, width), flat)
        sources = [self.dataset.source(index) for row in rows for index in row.tolist()]
        return Step(batch, sources, sum(lengths))

    def _plan(self, epoch: int) -> Plan:
        """Return the plan of an epoch; the last one is kept."""
        if self._planned is None or self._planned[0] != epoch:
            plan = make_plan(
                self.dataset.groups,
                self.dataset.lengths,
                epoch=epoch,
                seed=self._seed,
                shuffle=self._shuffle,
                pack=self.pack,
                width=self.dataset.width,
                rows_per_step=self._rows_per_step,
            )
            self._planned = (epoch, plan)
        return self._planned[1]
