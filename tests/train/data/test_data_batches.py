"""Epochs and their batches: nothing lost, nothing too long, the same loss however rows are laid."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm2_jax import init_params
from glm2_jax.runtime.buckets import bucket
from tests.support.toy import TOY
from tests.support.training_data import GLM2, alpaca, open_files, open_rows, write_rows
from train.data.batch import Batch
from train.data.batches import Batches
from train.data.dataset import Group
from train.data.plan import epoch_items, first_fit, make_plan, random_order
from train.step import make_eval

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=80)
CONFIG = dataclasses.replace(TOY, vocab_size=GLM2.size, num_layers=1)
MANY = settings(deadline=None, database=None, max_examples=200)
LAYOUTS = [
    {"pack": pack, "shuffle": shuffle} for pack in (False, True) for shuffle in (False, True)
]


def rows(count: int, name: str = "Q"):
    """Rows of very different lengths, some of two rounds."""
    texts = [f"{name}{n} " + "今天天气很好 " * (n * 7 % 5) for n in range(count)]
    history = [["你好", "你好！"]]
    return [
        {"instruction": t, "output": f"A{n}", "history": history if n % 4 == 3 else []}
        for n, t in enumerate(texts)
    ]


def epoch_of(batches: Batches, epoch: int):
    """All steps of an epoch."""
    return [batches.at(epoch, step) for step in range(batches.steps_per_epoch(epoch))]


def sources(batches: Batches, epoch: int) -> list[str]:
    """All sequences of an epoch, in the order of the batches."""
    return [source for step in epoch_of(batches, epoch) for source in step.sources]


def sequences(batch: Batch) -> list[tuple[list[int], list[bool]]]:
    """The sequences of a batch, found by their segments; checks positions and padding."""
    width = batch.tokens.shape[-1]
    found = []
    for tokens, segments, positions, learned in zip(
        *(array.reshape(-1, width) for array in dataclasses.astuple(batch)), strict=True
    ):
        padding = segments == 0
        assert not tokens[padding].any() and not learned[padding].any()
        assert not positions[padding].any() and (np.diff(padding.astype(int)) >= 0).all()
        for segment in range(1, segments.max() + 1):
            place = np.flatnonzero(segments == segment)
            assert (np.diff(place) == 1).all() and not learned[place[0]]
            assert (positions[place] == np.arange(len(place))).all()
            found.append((tokens[place].tolist(), learned[place].tolist()))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sequence_is_in_an_epoch_once(tmp_path, layout):
    dataset = open_rows(tmp_path / "data", rows(23), max_length=100)
    batches = Batches(dataset, batch_size=2, accumulate=3, **layout)
    own = [Batches(dataset, batch_size=2, accumulate=3, rows={n}, **layout) for n in (0, 1)]
    samples = [dataset.sample(i) for i in range(len(dataset))]
    for epoch in (0, 1):
        found = []
        for number, (batch, where, tokens) in enumerate(epoch_of(batches, epoch)):
            assert batch.tokens.shape[:2] == (3, 2) and tokens == (batch.segment_ids > 0).sum()
            kinds = [x.dtype for x in dataclasses.astuple(batch)]
            assert kinds == [np.int32, np.int32, np.int32, bool]
            inside = sequences(batch)
            assert len(inside) == len(where)
            found += inside
            for row, part in enumerate(own):  # processes read what one reads, and its places
                other = part.at(epoch, number)
                assert other.sources == where and not other.batch.segment_ids[:, 1 - row].any()
                jax.tree.map(
                    lambda x, y, row=row: np.testing.assert_array_equal(x[:, row], y[:, row]),
                    other.batch, batch,
                )  # fmt: skip
        assert sorted(found) == sorted((sample.ids, sample.learned) for sample in samples)


def test_the_loss_is_that_of_one_row_at_a_time(tmp_path):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    loss_of = make_eval(CONFIG)
    dataset = open_rows(tmp_path / "data", rows(16), max_length=64, max_bad=None)
    alone = np.zeros(2)
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        row = np.zeros((4, 2, 64), np.int32)  # the other row is empty
        n = len(sample.ids)
        for array, values in zip(row, (sample.ids, 1, range(n), sample.learned), strict=True):
            array[0, :n] = values
        alone += loss_of(params, None, Batch(*row[:3], row[3].astype(bool)))
    for layout in LAYOUTS:
        total = np.zeros(2)
        for step in epoch_of(Batches(dataset, batch_size=2, **layout), 0):
            total += loss_of(params, None, jax.tree.map(lambda array: array[0], step.batch))
        assert total[1] == alone[1] and total[0] == pytest.approx(alone[0], rel=1e-5)


@pytest.mark.parametrize("pack", [False, True])
def test_a_step_depends_on_nothing_but_its_place(tmp_path, pack):
    dataset = open_rows(tmp_path / "data", rows(30), max_length=100)

    def new():
        return Batches(dataset, batch_size=2, accumulate=2, pack=pack, seed=3)

    one = new()
    wanted = {(epoch, step): one.at(epoch, step) for epoch in (0, 1) for step in (0, 1, 2)}
    for place in reversed(wanted):
        step = new().at(*place)
        jax.tree.map(np.testing.assert_array_equal, step.batch, wanted[place].batch)
        assert step.sources == wanted[place].sources
    orders = [sources(one, 0), sources(one, 1), sources(Batches(dataset, batch_size=4), 0)]
    assert len(set(map(tuple, orders))) == 3 and len(set(map(frozenset, orders))) == 1
    places = [(epoch, step) for epoch in range(3) for step in range(one.steps_per_epoch(epoch))]
    for start in (0, 3, len(places) - 1):
        assert list(itertools.islice(new().places(start), len(places) - start)) == places[start:]
    paths = [write_rows(tmp_path / name, rows(9, name)) for name in "ba"]
    dataset = open_files(paths, max_length=100)
    plain = Batches(dataset, batch_size=2, accumulate=2, pack=pack, shuffle=False)
    names = [dataset.source(index) for index in range(len(dataset))]
    assert sources(plain, 0) == sources(plain, 7) == names


def test_random_order_never_changes():
    assert random_order(10, 1, 2, 3).tolist() == [1, 8, 2, 4, 6, 5, 0, 9, 7, 3]
    assert len({tuple(random_order(30, *seeds)) for seeds in ((0, 0), (1, 0), (0, 1))}) == 3


@MANY
@given(LENGTHS)
def test_first_fit_is_the_first_row_with_room(lengths):
    by_hand, room = [], []
    for length in lengths:
        row = next((r for r, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            room.append(30)
        room[row] -= length
        by_hand.append(row)
    assert first_fit(np.array(lengths, np.int32), 30).tolist() == by_hand


@MANY
@given(LENGTHS, st.sampled_from(LAYOUTS), st.integers(0, 9), st.integers(1, 5))
def test_plans_lose_nothing(lengths, layout, epoch, rows_per_step):
    lengths = np.array(lengths, np.int32)
    plan = make_plan(
        [Group(0, len(lengths), 1.0)], lengths, epoch=epoch, seed=1, width=30,
        rows_per_step=rows_per_step, **layout,
    )  # fmt: skip
    rows = [plan.row(number) for number in range(len(plan.starts) - 1)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    assert all(len(row) and lengths[row].sum() <= 30 for row in rows)
    assert layout["pack"] or all(len(row) == 1 for row in rows)
    if layout == {"pack": True, "shuffle": False}:  # no row begins too early
        room = [30 - lengths[row].sum() for row in rows]
        assert all(lengths[row[0]] > left for row, left in zip(rows[1:], room, strict=False))
    assert len(plan.row(len(rows))) == 0
    assert layout["shuffle"] or np.concatenate(rows).tolist() == list(range(len(lengths)))


def test_steps_hold_sequences_of_like_length_in_random_order():
    lengths = np.array([50, 70, 200, 400] * 200, np.int32)
    plan = make_plan(
        [Group(0, 800, 1.0)], lengths, epoch=0, seed=0, shuffle=True, pack=False, width=400,
        rows_per_step=8,
    )  # fmt: skip
    steps = [[bucket(int(n), 400) for n in lengths[step]] for step in plan.items.reshape(-1, 8)]
    assert sum(len(set(step)) > 1 for step in steps) <= 12  # where two lengths meet in a window
    widths = [max(step) for step in steps]
    assert sum(a != b for a, b in itertools.pairwise(widths)) > 40


@pytest.mark.parametrize("shuffle", [False, True])
def test_weights_are_how_often_a_row_comes(shuffle):
    groups = [Group(0, 10, 2.5), Group(10, 30, 0.25), Group(30, 33, 0.01)]
    counts = []
    for epoch in range(4):
        items = epoch_items(groups, epoch=epoch, seed=0, shuffle=shuffle)
        counts.append(np.bincount(items, minlength=33))
        first, second, third = np.split(counts[-1], [10, 30])
        assert sorted(first.tolist()) == [2] * 5 + [3] * 5
        assert sorted(second.tolist()) == [0] * 15 + [1] * 5
        assert third.sum() == 1  # a file that is named is never left out
    if not shuffle:  # a file's rows take turns
        assert set(sum(counts)[10:30].tolist()) == {1}
    assert any((a != b).any() for a, b in itertools.pairwise(counts))


@pytest.mark.parametrize(("shuffle", "ratio", "general"), [(True, 0.2, 5), (False, 0.9, 180)])
def test_general_rows_are_their_share_of_an_epoch(tmp_path, capsys, shuffle, ratio, general):
    own = write_rows(tmp_path / "own", [{"content": f"Q{n}", "summary": "A"} for n in range(20)])
    other = write_rows(tmp_path / "other", [alpaca(f"G{n}") for n in range(50)])
    dataset = open_files([own], mix=(other, ratio))
    said = f"general sequences in an epoch: {general}, drawn from 50\n"
    assert capsys.readouterr().err == said
    batches = Batches(dataset, batch_size=4, shuffle=shuffle)
    drawn = []
    for epoch in range(2):
        found = [source.rpartition("/")[2] for source in sources(batches, epoch)]
        own_rows = [place for place, name in enumerate(found) if name.startswith("own")]
        drawn.append(sorted(name for name in found if name.startswith("other")))
        assert len(drawn[-1]) == general and len(found) == 20 + general
        if not shuffle:
            assert [found[place] for place in own_rows] == [f"own:{n}" for n in range(1, 21)]
            assert np.diff(own_rows).max() <= general / 20 + 2  # general rows are spread evenly
    assert drawn[0] != drawn[1]


# Whatever decides what is padded together must not decide how much a row is learned.
EPOCHS, SEEDS = 20, 3
LONG = 250  # tokens from which a sequence counts as long
ONE_FILE = [Group(0, 200, 1.0)]
MIXTURE = [Group(0, 50, 2.5), Group(50, 180, 0.5), Group(180, 200, 1.3, general=True)]
MORE = [Group(0, 1100, 1.0)]  # more than the steps that are sorted together hold


@pytest.mark.parametrize(
    ("groups", "pack", "size", "share"),
    [
        (ONE_FILE, False, 32, 0.9), (MIXTURE, True, 32, 0.03), (MORE, False, 8, 0.2),
    ],
)  # fmt: skip
def test_rows_of_every_length_count_the_same_at_the_same_rate(groups, pack, size, share):
    rng = np.random.default_rng(7)
    count = max(group.stop for group in groups)
    long = rng.random(count) < share
    lengths = np.where(long, rng.integers(LONG, 400, count), rng.integers(9, 60, count))
    found = []  # whether a sequence is long, 1 / the rows of its step, and when the step comes
    for seed, epoch in np.ndindex(SEEDS, EPOCHS):
        plan = make_plan(
            groups, lengths.astype(np.int32), epoch=epoch, seed=seed, shuffle=True, pack=pack,
            width=512, rows_per_step=size,
        )  # fmt: skip
        rows = len(plan.starts) - 1
        for row in range(rows):
            step = row // size
            weight, when = 1 / min(size, rows - step * size), (step + 0.5) / -(-rows // size)
            found += [(lengths[item] >= LONG, weight, when) for item in plan.row(row)]
    found = np.array(found, np.float64)
    is_long = found[:, 0] > 0
    for column in (1, 2):
        a, b = found[is_long, column], found[~is_long, column]
        # What stands in one row or step is not independent: steps are counted, not sequences.
        draws = EPOCHS * SEEDS * min(len(a), len(b)) / max(len(a), len(b), size)
        error = found[:, column].std() * np.sqrt(2 / max(draws, EPOCHS * SEEDS))
        assert abs(a.mean() - b.mean()) <= 4 * error, (column, a.mean(), b.mean(), error)
