"""Checkpoints are loaded straight into the shards of a mesh, and written from there.

The checks run in one process of eight virtual devices, see tests/support/mesh_loading.py.
"""

import pytest

from tests.support import mesh_process
from tests.support.mesh_loading import CHECKS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return mesh_process.run("tests.support.mesh_loading", str(tmp_path_factory.mktemp("loading")))


@pytest.mark.parametrize("name", CHECKS)
def test_loading_onto_a_mesh(results, name):
    assert results[name] == "ok", results[name]
