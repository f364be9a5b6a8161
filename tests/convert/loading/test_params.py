"""`load_params`: every part of every layer in its place, filled once, in pieces of bounded size."""

import jax
import numpy as np
import pytest

from convert.loading import params, values
from convert.loading.folder import open_folder
from convert.loading.params import DevicePlace, HostPlace, load_params
from glm2_jax import make_mesh, parse_mesh
from glm2_jax.schemes import SCHEMES
from tests.support.checkpoints import TINY, random_params, write_official

FLOAT32 = np.dtype(np.float32)


def load(folder, *, scheme=None, as_list=False, where=None):
    """The params, and the calls of `progress`."""
    seen = []
    found = load_params(folder, FLOAT32, scheme, as_list, where, lambda *call: seen.append(call))
    return jax.tree.map(np.asarray, found), seen


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("scheme", [None, SCHEMES["int8"], SCHEMES["int4+embeddings"]])
def test_lists_small_pieces_devices_and_meshes_give_the_same(tmp_path, monkeypatch, scheme):
    """The path for accelerators is driven on the CPU."""
    folder = open_folder(write_official(tmp_path, dtype="float32"))
    expected, (*_, last) = load(folder, scheme=scheme)
    if scheme is None:
        assert_equal(expected, random_params(TINY))
    assert last == (sum(x.nbytes for x in jax.tree.leaves(expected)),) * 2
    as_list, _ = load(folder, scheme=scheme, as_list=True)
    for i, layer in enumerate(as_list["layers"]):
        assert_equal(layer, jax.tree.map(lambda x, i=i: x[i], expected["layers"]))
    monkeypatch.setattr(values, "CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(params, "HostPlace", DevicePlace)
    mesh = make_mesh(parse_mesh("data=1"), jax.devices()[:1])
    for where in (None, jax.devices()[0], mesh):
        found, seen = load(folder, scheme=scheme, where=where)
        assert_equal(found, expected)
        assert seen[-1] == last and len(seen) > 200 and seen == sorted(seen)


def test_pieces_are_written_in_place():
    """The compiled update needs no second array: its result is its donated argument."""
    array = jax.ShapeDtypeStruct((4, 512, 512), np.float32)
    piece = jax.ShapeDtypeStruct((1, 2, 512), np.float16)
    memory = params._update.lower(array, piece, (0, 0, 0)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4 * 512 * 512 * 4
    assert memory.temp_size_in_bytes < 100_000


def test_host_arrays_reach_jax_without_a_copy():
    stacked = HostPlace((2, 1000), FLOAT32, [None])
    stacked.write((slice(0, 2), slice(0, 1000)), np.zeros((2, 1000), np.float16))
    (array,) = stacked.finish()
    assert array.unsafe_buffer_pointer() == stacked.array.ctypes.data
