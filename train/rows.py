"""The rows of a batch on a mesh: each process makes those of its own devices, and no others."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm2_jax.sharding import rows_sharding
from train.batch import Batch
from train.data.batches import Batches


class MeshBatches:
    """`Batches` whose arrays lie on a mesh; used like them.

    Args:
        batches: the same in all processes.
        mesh: of all processes.
    """

    def __init__(self, batches: Batches, mesh: Mesh):
        self._batches, self._mesh = batches, mesh
        self._own = frozenset(local_rows(batches.shape[1], mesh))
        self.place, self.tokens = batches.place, batches.tokens

    def at(self, epoch: int, step: int) -> tuple[Batch, list[str]]:
        """A step's arrays, [A, B, T] with B padded, and "file:line" of this process's sequences."""
        batch, sources = self._batches.at(epoch, step, self._own)
        return global_batch(batch, self._mesh), sources


def padded_rows(rows: int, mesh: Mesh) -> int:
    """So many rows, or the next number that the mesh divides: those added are empty."""
    pieces = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // pieces) * pieces


def local_rows(rows: int, mesh: Mesh) -> list[int]:
    """Which rows of a batch of so many lie on devices of this process, in order."""
    places = rows_sharding(mesh).addressable_devices_indices_map((padded_rows(rows, mesh),))
    return sorted({row for place in places.values() if place for row in range(rows)[place[0]]})


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch of all processes from what this one has made of it.

    Args:
        batch: pytree of numpy arrays [..., B, T], whole; only the rows of `local_rows` are looked
            at.
        mesh: of all processes.

    Returns:
        The same of `jax.Array`s that are cut along B, which grows to `padded_rows`: the rows added
        are zeros, that is padding.
    """

    def place(array: np.ndarray) -> jax.Array:
        *before, rows, width = array.shape
        added = padded_rows(rows, mesh) - rows
        whole = np.pad(array, [(0, 0)] * len(before) + [(0, added), (0, 0)])
        spec = PartitionSpec(*[None] * len(before), *rows_sharding(mesh).spec)
        return jax.make_array_from_callback(
            whole.shape, NamedSharding(mesh, spec), lambda index: whole[index]
        )

    return jax.tree.map(place, batch)
