"""Each process makes its own rows of a batch; together they are the batch."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from glm2_jax.sharding import make_mesh
from tests.training_data import alpaca, open_rows
from train.data.batches import Batches
from train.rows import MeshBatches, global_batch, local_rows, padded_rows

ROWS = [alpaca(f"Q{i}", "A" * (i + 1)) for i in range(7)]


@pytest.fixture
def batches(tmp_path):
    dataset = open_rows(tmp_path / "rows.jsonl", ROWS)
    return Batches(dataset, batch_size=4, accumulate=2, shuffle=False)


def test_rows_of_all_processes_are_the_batch(batches):
    whole, sources = batches.at(0, 0)
    parts = [batches.at(0, 0, only) for only in ({0, 1}, [2], range(3, 4))]
    for array, *made in zip(
        *map(jax.tree.leaves, [whole, *(part for part, _ in parts)]), strict=True
    ):
        assert {part.shape for part in made} == {array.shape}
        np.testing.assert_array_equal(sum(part.astype(int) for part in made), array)
        assert not made[0][:, 2:].any() and made[1][0, 2].any()
    assert sorted(source for _, part in parts for source in part) == sorted(sources)
    assert len(sources) == 7 and all(len(part) < 7 for _, part in parts)


def test_tokens_are_counted_without_making_them(batches):
    batch, _ = batches.at(0, 0)
    assert batches.tokens(0, 0) == (batch.segment_ids > 0).sum() > 0
    with pytest.raises(IndexError):
        batches.tokens(0, 1)


class FourProcesses:
    """A mesh of eight devices, two in each of four processes, of which this one is the third."""

    def __init__(self, **sizes):
        self.shape = {"data": 1, "fsdp": 1, "tensor": 1, **sizes}
        self.axis_names = tuple(self.shape)


@pytest.mark.parametrize(
    ("rows", "pieces", "padded"), [(8, 8, 8), (5, 4, 8), (1, 2, 2), (3, 1, 3), (9, 8, 16)]
)
def test_rows_are_padded_to_what_the_mesh_divides(rows, pieces, padded):
    assert padded_rows(rows, FourProcesses(data=pieces, tensor=8 // pieces)) == padded
    assert padded_rows(rows, FourProcesses(fsdp=pieces)) == padded


@pytest.mark.parametrize(
    ("cut", "own"),
    [
        ({0: slice(4, 6), 1: slice(6, 8)}, [4]),  # of 5 rows in four pieces of two
        ({0: slice(0, 2), 1: slice(0, 2)}, [0, 1]),
        ({0: slice(None), 1: slice(None)}, [0, 1, 2, 3, 4]),
        ({0: slice(6, 8)}, []),
    ],
)
def test_the_rows_of_this_process_are_those_of_its_devices(monkeypatch, cut, own):
    class Places:
        def addressable_devices_indices_map(self, shape):
            assert shape == (8,)
            return {device: (place,) for device, place in cut.items()}

    monkeypatch.setattr("train.rows.rows_sharding", lambda mesh: Places())
    assert local_rows(5, FourProcesses(data=4)) == own


def test_a_batch_lies_on_the_mesh(batches):
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    placed = MeshBatches(batches, mesh)
    batch, sources = placed.at(0, 0)
    plain, plain_sources = batches.at(0, 0)
    assert placed.tokens(0, 0) == batches.tokens(0, 0) and placed.place(0) == (0, 0)
    assert sources == plain_sources
    for array, same in zip(*map(jax.tree.leaves, [batch, plain]), strict=True):
        assert isinstance(array.sharding, NamedSharding) and array.dtype == same.dtype
        np.testing.assert_array_equal(array, same)


def test_rows_that_are_added_are_empty(monkeypatch, batches):
    monkeypatch.setattr("train.rows.padded_rows", lambda rows, mesh: 6)
    plain, _ = batches.at(0, 0)
    batch = global_batch(plain, make_mesh({"data": 1}, jax.devices()[:1]))
    assert batch.tokens.shape == (2, 6, plain.tokens.shape[-1])
    np.testing.assert_array_equal(batch.tokens[:, :4], plain.tokens)
    assert not any(array[:, 4:].any() for array in jax.tree.leaves(batch))
