"""How much each row is learned: whatever decides what is padded together must not decide that."""

import numpy as np
import pytest

from tests.support.training_data import alpaca, open_rows
from train.data.batches import Batches
from train.data.dataset import Group
from train.data.plan import make_plan

EPOCHS, SEEDS = 20, 3
LONG = 250  # tokens from which a sequence counts as long

ONE_FILE = [Group(0, 200, 1.0)]
MIXTURE = [Group(0, 50, 2.5), Group(50, 180, 0.5), Group(180, 200, 1.3, general=True)]
MANY = [Group(0, 1100, 1.0)]  # more than the steps that are sorted together hold
CASES = [
    (ONE_FILE, False, 8, 0.03), (ONE_FILE, False, 32, 0.9), (ONE_FILE, True, 8, 0.2),
    (MIXTURE, False, 32, 0.2), (MIXTURE, False, 8, 0.9), (MIXTURE, True, 32, 0.03),
    (MANY, False, 8, 0.2), (MANY, False, 32, 0.03), (MANY, True, 8, 0.9),
]  # fmt: skip


def weights(lengths: np.ndarray, groups: list[Group], pack: bool, size: int) -> np.ndarray:
    """Of every occurrence of a sequence: whether it is long, 1 / the rows of its step, and where in
    the epoch the step is, from 0 to 1; float64 [occurrences, 3]."""
    found = []
    for seed, epoch in np.ndindex(SEEDS, EPOCHS):
        plan = make_plan(
            groups, lengths, epoch=epoch, seed=seed, shuffle=True, pack=pack, width=512,
            rows_per_step=size,
        )  # fmt: skip
        rows = len(plan.starts) - 1
        steps = -(-rows // size)
        for row in range(rows):
            step = row // size
            share = 1 / min(size, rows - step * size)
            for item in plan.row(row):
                found.append((lengths[item] >= LONG, share, (step + 0.5) / steps))
    return np.array(found, np.float64)


@pytest.mark.parametrize(("groups", "pack", "size", "share"), CASES)
def test_rows_of_every_length_count_the_same_at_the_same_rate(groups, pack, size, share):
    rng = np.random.default_rng(7)
    count = max(group.stop for group in groups)
    long = rng.random(count) < share
    lengths = np.where(long, rng.integers(LONG, 400, count), rng.integers(9, 60, count))
    found = weights(lengths.astype(np.int32), groups, pack, size)
    is_long = found[:, 0] > 0
    for column in (1, 2):
        a, b = found[is_long, column], found[~is_long, column]
        # What stands in one row or step is not independent: steps are counted, not sequences.
        draws = EPOCHS * SEEDS * min(len(a), len(b)) / max(len(a), len(b), size)
        error = found[:, column].std() * np.sqrt(2 / max(draws, EPOCHS * SEEDS))
        assert abs(a.mean() - b.mean()) <= 4 * error, (column, a.mean(), b.mean(), error)


def test_the_one_long_row_is_rarely_alone_in_a_step(tmp_path):
    rows = [alpaca(f"q{n}", "long " * 60 if n == 40 else f"a{n}") for n in range(97)]
    dataset = open_rows(tmp_path / "data", rows)
    alone = 0
    for seed in range(4):
        batches = Batches(dataset, batch_size=4, accumulate=8, seed=seed)
        for epoch in range(10):
            steps = [batches.at(epoch, x).sources for x in range(batches.steps_per_epoch(epoch))]
            sizes = [len(step) for step in steps if f"{tmp_path / 'data'}:41" in step]
            assert len(sizes) == 1
            alone += sizes == [1]
    assert alone <= 3  # 1 in 97 is expected
