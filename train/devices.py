"""The devices of a training run: one, or a mesh of them, in one process or in several.

On a mesh the rows of a batch are split over `data` and `fsdp`. Trained arrays and their optimizer
state are split like the weights that they belong to.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from glm2_jax.mesh import partition
from glm2_jax.sharding import replicated
from train.data.batch import Batch
from train.step import State, init_state


class Devices:
    """The devices of a run: a mesh, or without one `first` alone; `first` is of this process and
    stands for all of them, as they are of one kind."""

    def __init__(self, first: Any, mesh: Mesh | None = None):
        self.first, self.mesh = first, mesh

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which programs are traced for the mesh, where there is one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def put(self, tree: Any, places: Any) -> Any:
        """Put arrays that all processes have alike on the devices; on a mesh at these shardings."""
        if self.mesh is None:
            return jax.device_put(tree, self.first)
        return jax.tree.map(_placed, tree, places)

    def key(self, seed: int) -> jax.Array:
        """Return the random key of a seed."""
        make = partial(jax.random.key, seed)
        return make() if self.mesh is None else jax.jit(make, out_shardings=replicated(self.mesh))()

    def state(
        self, optimizer: optax.GradientTransformation, trained: Any, *, loss_scaling: bool
    ) -> State:
        """Return `init_state` of trained arrays that are on the devices already."""
        make = partial(init_state, optimizer, loss_scaling=loss_scaling)
        if self.mesh is None:
            return make(trained)
        places = state_sharding(optimizer, trained, self.mesh, loss_scaling=loss_scaling)
        return jax.jit(make, out_shardings=places)(trained)

    def shardings(self, *trees: Any) -> Any:
        """Return the `out_shardings` of a program that returns trees like these and something
        small; None without a mesh."""
        if self.mesh is None:
            return None
        return (*jax.tree.map(lambda x: x.sharding, trees), replicated(self.mesh))

    def rows(self, count: int) -> frozenset[int]:
        """Return which of the `count` rows of a batch the devices of this process compute."""
        if self.mesh is None:
            return frozenset(range(count))
        shape = (count + self._missing(count),)
        found = _rows_sharding(self.mesh, 0).addressable_devices_indices_map(shape)
        each = (range(shape[0])[index[0]] for index in found.values() if index)
        return frozenset(row for rows in each for row in rows if row < count)

    def batch(self, batch: Batch) -> Batch:
        """Put a batch [..., B, T] on the devices, with empty rows at its end where the mesh does
        not divide B."""
        if self.mesh is None:
            return batch
        axis = batch.tokens.ndim - 2
        pad = [(0, 0)] * axis + [(0, self._missing(batch.tokens.shape[axis])), (0, 0)]
        place = _rows_sharding(self.mesh, axis)
        return jax.tree.map(lambda x: _placed(np.pad(x, pad), place), batch)

    def _missing(self, rows: int) -> int:
        """Return how many rows more the mesh divides."""
        assert self.mesh is not None
        return -rows % (self.mesh.shape["data"] * self.mesh.shape["fsdp"])


def state_sharding(
    optimizer: optax.GradientTransformation, trained: Any, mesh: Mesh, *, loss_scaling: bool = False
) -> State:
    """Return the shardings of a state: moments like the arrays they belong to (or their shapes with
    shardings), the rest complete."""
    complete = replicated(mesh)
    make = partial(init_state, optimizer, loss_scaling=loss_scaling)
    places = jax.tree.map(lambda x: complete, jax.eval_shape(make, trained))
    moments = optax.tree.map_params(
        optimizer, lambda _, x: x.sharding, places.optimizer, trained,
        transform_non_params=lambda _: complete,
    )  # fmt: skip
    return places.replace(optimizer=moments)


def _rows_sharding(mesh: Mesh, before: int) -> NamedSharding:
    """Return the sharding of arrays whose rows follow this many other axes."""
    shape = (1,) * before + (mesh.size,)
    return NamedSharding(mesh, partition((None,) * before + ("B",), shape, mesh.shape))


def _placed(x: Any, place: NamedSharding) -> jax.Array:
    """Put an array that every host has; no process sends it to another."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])
