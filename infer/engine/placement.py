"""The placement of the arrays of the engine's programs: on one device, or cut over a mesh.

Every program takes its arrays where the one before left them, so nothing is moved between steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from glm2_jax.cache import AXES, KVCache
from glm2_jax.mesh import partition
from glm2_jax.sharding import replicated
from infer.engine.steps import Output


class Places:
    """Places arrays on a mesh: caches are cut by rows and key/value heads, outputs are replicated,
    arrays that are on the mesh already stay where they are, and all others are cut by rows.

    Attributes:
        mesh: None = one device.
        device: that one; None = the default one.
        rows: what the rows of a batch have to be a multiple of.
    """

    def __init__(self, mesh: Mesh | None = None, device: Any = None):
        self.mesh, self.device = mesh, device
        self.rows = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    def active(self) -> AbstractContextManager[Any]:
        """Return the context in which the model is traced and compiled for the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def trace(self, function: Callable, args: Any, donate: int | None = None) -> Any:
        """Do `jax.jit(function).trace(*args)` with a sharding for each argument and result.

        The result may take over the buffers of the argument at position `donate`.
        """
        donated = () if donate is None else donate
        if self.mesh is None:
            return jax.jit(function, donate_argnums=donated).trace(*args)
        args = jax.tree.map(_shape, args, self._of(args))
        with self.active():
            results = self._of(jax.eval_shape(function, *args))
            return jax.jit(function, donate_argnums=donated, out_shardings=results).trace(*args)

    def put(self, tree: Any) -> Any:
        """Put NumPy arrays that several programs take where they are used."""
        if self.mesh is None:
            return jax.device_put(tree, self.device)

        def put(x: np.ndarray, where: NamedSharding) -> jax.Array:
            # Each process takes only its part; `jax.device_put` would first compare all parts.
            return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

        return jax.tree.map(put, tree, self._of(tree))

    def _of(self, tree: Any) -> Any:
        """Return the same tree, of shardings."""

        def has_places(x: Any) -> bool:
            return isinstance(x, KVCache | Output)

        return jax.tree.map(self._place, tree, is_leaf=has_places)

    def _place(self, x: Any) -> Any:
        assert self.mesh is not None
        if isinstance(x, KVCache):
            cut: Any = {
                name: jax.tree.map(lambda part, axes=axes: self._cut(part, axes), getattr(x, name))
                for name, axes in AXES.items()
            }
            blanks = jax.tree.map(lambda row: self._cut(row, "B"), x.blanks)
            return KVCache(**cut, blanks=blanks)
        if isinstance(x, Output):
            everywhere = replicated(self.mesh)
            return jax.tree.map(lambda _: everywhere, x)
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
            return x.sharding
        return self._cut(x, "B" if np.ndim(x) else "")

    def _cut(self, x: Any, letters: str) -> NamedSharding:
        assert self.mesh is not None
        letters = letters.ljust(np.ndim(x), ".")[: np.ndim(x)]
        return NamedSharding(self.mesh, partition(letters, np.shape(x), self.mesh.shape))


def _shape(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype), sharding=where)
