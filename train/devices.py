"""Where a training computes: on one device, or over a mesh of them, in one process or in several.

On a mesh the rows of a batch lie over `data` and `fsdp`, and what is trained, with the optimizer's
state of it, as the weights do that it belongs to.
"""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from glm2_jax.mesh import partition
from glm2_jax.runtime.devices import find_device, find_mesh
from glm2_jax.sharding import replicated
from train.data.batch import Batch
from train.step import State, init_state


class Devices:
    """The devices of a run.

    Args:
        first: one of this process.
        mesh: all of them; None = that one alone.

    Attributes:
        first: stands for all of them, as they are of one kind.
        mesh: see above.
    """

    def __init__(self, first: Any, mesh: Mesh | None = None):
        self.first, self.mesh = first, mesh

    @classmethod
    def of(cls, args: argparse.Namespace) -> Devices:
        """Those that `--device`, `--mesh` and `--tp` name; errors as of `find_mesh`."""
        mesh = find_mesh(args.mesh, args.device)
        return cls(find_device(args.device) if mesh is None else mesh.local_devices[0], mesh)

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, programs are traced for the mesh, where there is one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def put(self, tree: Any, places: Any = None) -> Any:
        """Arrays that all processes have alike, where they are computed with.

        Args:
            tree: of arrays.
            places: shardings for a mesh, a tree like it; None = whole on every device.
        """
        if self.mesh is None:
            return jax.device_put(tree, self.first)
        if places is None:
            whole = replicated(self.mesh)
            places = jax.tree.map(lambda x: whole, tree)
        return jax.tree.map(_placed, tree, places)

    def key(self, seed: int) -> jax.Array:
        """The random key of a seed."""
        make = partial(jax.random.key, seed)
        return make() if self.mesh is None else jax.jit(make, out_shardings=replicated(self.mesh))()

    def state(
        self, optimizer: optax.GradientTransformation, trained: Any, *, loss_scaling: bool
    ) -> State:
        """`init_state` of what is trained, which is placed already."""
        make = partial(init_state, optimizer, loss_scaling=loss_scaling)
        if self.mesh is None:
            return make(trained)
        places = state_sharding(optimizer, trained, self.mesh, loss_scaling=loss_scaling)
        return jax.jit(make, out_shardings=places)(trained)

    def shardings(self, *trees: Any) -> Any:
        """Where placed arrays lie, and whatever stands behind them: `out_shardings` of a program
        that returns such trees and something small. None without a mesh."""
        if self.mesh is None:
            return None
        return (*jax.tree.map(lambda x: x.sharding, trees), replicated(self.mesh))

    def rows(self, count: int) -> frozenset[int]:
        """Which of the `count` rows of a batch the devices of this process compute."""
        if self.mesh is None:
            return frozenset(range(count))
        shape = (self._padded(count),)
        found = _rows_sharding(self.mesh, 0).addressable_devices_indices_map(shape)
        each = (range(shape[0])[index[0]] for index in found.values() if index)
        return frozenset(row for rows in each for row in rows if row < count)

    def batch(self, batch: Batch) -> Batch:
        """A batch [..., B, T] of the host where it is computed: with empty rows behind the others
        where the mesh does not divide B."""
        if self.mesh is None:
            return batch
        axis = batch.tokens.ndim - 2
        more = self._padded(batch.tokens.shape[axis]) - batch.tokens.shape[axis]
        place = _rows_sharding(self.mesh, axis)

        def put(x: np.ndarray) -> jax.Array:
            pad = [(0, more if number == axis else 0) for number in range(x.ndim)]
            return _placed(np.pad(x, pad), place)

        return jax.tree.map(put, batch)

    def _padded(self, rows: int) -> int:
        assert self.mesh is not None
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-rows // parts) * parts


def state_sharding(
    optimizer: optax.GradientTransformation,
    trained: Any,
    mesh: Mesh,
    *,
    loss_scaling: bool = False,
) -> State:
    """Where the state of a training lies: its moments as what they belong to, the rest whole.

    Args:
        trained: arrays on the mesh, or their shapes with shardings.
    """
    whole = replicated(mesh)
    make = partial(init_state, optimizer, loss_scaling=loss_scaling)
    places = jax.tree.map(lambda x: whole, jax.eval_shape(make, trained))
    own = optax.tree.map_params(
        optimizer, lambda _, x: x.sharding, places.optimizer, trained,
        transform_non_params=lambda _: whole,
    )  # fmt: skip
    return places.replace(optimizer=own)


def _rows_sharding(mesh: Mesh, before: int) -> NamedSharding:
    """Of arrays whose rows come behind so many other axes."""
    shape = (1,) * before + (mesh.size,)
    return NamedSharding(mesh, partition((None,) * before + ("B",), shape, mesh.shape))


def _placed(x: Any, place: NamedSharding) -> jax.Array:
    """An array that the host has all of; no process sends it to another."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])
