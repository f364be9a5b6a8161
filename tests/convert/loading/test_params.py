"""`load_params`: every part of every layer in its place, filled once, in pieces of bounded size."""

import jax
import numpy as np
import pytest

from convert.layouts.names import PARTS
from convert.loading import params, values
from convert.loading.boxes import full_box, pieces
from convert.loading.folder import open_folder
from convert.loading.params import DevicePlace, HostPlace, Place, load_params
from glm2_jax import make_mesh, parse_mesh
from glm2_jax.schemes import SCHEMES
from tests.support.checkpoints import TINY, random_params, write_official

FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return open_folder(write_official(tmp_path_factory.mktemp("folder"), dtype="float32"))


def load(folder, *, dtype=FLOAT32, scheme=None, as_list=False, where=None):
    """The params, and the calls of `progress`."""
    seen = []
    params = load_params(folder, dtype, scheme, as_list, where, lambda *call: seen.append(call))
    return jax.tree.map(np.asarray, params), seen


def unstacked(params):
    layers = params["layers"]
    return [{name: x[i] for name, x in layers.items()} for i in range(TINY.num_layers)]


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_every_part_is_in_its_place(folder):
    params, seen = load(folder)
    assert_equal(params, random_params(TINY))
    assert len(jax.tree.leaves(params)) == len(PARTS)
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    assert seen[-1] == (total, total) and seen == sorted(seen)
    as_list, _ = load(folder, as_list=True)
    assert_equal(as_list, params | {"layers": unstacked(params)})


@pytest.mark.parametrize("scheme", [None, SCHEMES["int8"], SCHEMES["int4+embeddings"]])
def test_small_pieces_devices_and_meshes_give_the_same(folder, monkeypatch, scheme):
    """The path for accelerators is driven on the CPU."""
    expected, (*_, last) = load(folder, scheme=scheme)
    monkeypatch.setattr(values, "CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(params, "HostPlace", DevicePlace)
    mesh = make_mesh(parse_mesh("data=1"), jax.devices()[:1])
    for where in (None, jax.devices()[0], mesh):
        found, seen = load(folder, scheme=scheme, where=where)
        assert_equal(found, expected)
        assert seen[-1] == last and len(seen) > 200


def test_a_place_takes_what_is_its_own():
    place = Place((4, 6), FLOAT32, None)
    array = np.arange(24, dtype=np.float16).reshape(4, 6)
    for box in pieces(full_box((4, 6)), 5):
        assert place.write(box, array[tuple(slice(*side) for side in box)]) <= 5 * 4
    np.testing.assert_array_equal(np.asarray(place.finish()), array)


def test_pieces_are_written_in_place():
    """The compiled update needs no second array: its result is its donated argument."""
    array = jax.ShapeDtypeStruct((4, 512, 512), np.float32)
    piece = jax.ShapeDtypeStruct((1, 2, 512), np.float16)
    memory = params._update.lower(array, piece, (0, 0, 0)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4 * 512 * 512 * 4
    assert memory.temp_size_in_bytes < 100_000


def test_host_arrays_reach_jax_without_a_copy():
    stacked = HostPlace((2, 1000), FLOAT32, [None])
    stacked.write((slice(0, 1), slice(0, 1000)), np.arange(1000, dtype=np.float16)[None])
    stacked.write((slice(1, 2), slice(0, 1000)), np.zeros((1, 1000), np.float16))
    (array,) = stacked.finish()
    assert array.unsafe_buffer_pointer() == stacked.array.ctypes.data
