"""The static-shape key/value cache."""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from glm2_jax.config import GLMConfig
from glm2_jax.mesh import active_mesh, constrain
from glm2_jax.prefix import Prefix

AXES = {"k": "LBSKH", "v": "LBSKH", "length": "B", "prefix": "B"}  # letters of `glm2_jax.model`


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer for a batch of rows, each row at its own length.

    Slots 0 .. length - 1 of a row are written; what lies behind is never read. Setting `length`
    of a row to `prefix` frees it for another sequence.

    Attributes:
        k: [L, B, S, K, H] keys, already rotated.
        v: [L, B, S, K, H] values.
        length: [B] int32, written slots of each row.
        prefix: [B] int32, leading slots of each row that have no position (prefix tuning).
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array
    prefix: jax.Array

    @classmethod
    def zeros(cls, config: GLMConfig, batch: int, size: int, dtype) -> KVCache:
        """An empty cache of `batch` rows with `size` slots, in parts on the devices of an active
        mesh.

        Zeros, not uninitialized memory: a masked slot has probability 0, and 0 times NaN is NaN.
        """
        shape = (config.num_layers, batch, size, config.num_kv_heads, config.head_dim)

        def make() -> KVCache:
            return cls(
                k=jnp.zeros(shape, dtype),
                v=jnp.zeros(shape, dtype),
                length=jnp.zeros(batch, jnp.int32),
                prefix=jnp.zeros(batch, jnp.int32),
            ).pinned()

        return jax.jit(make)() if active_mesh() else make()  # jit: never whole on one device

    def pinned(self) -> KVCache:
        """The cache, pinned to the active mesh as `glm2_jax.sharding.cache_sharding` says."""
        pinned = {name: constrain(getattr(self, name), *axes) for name, axes in AXES.items()}
        return dataclasses.replace(self, **pinned)

    @classmethod
    def new(cls, config: GLMConfig, batch: int, size: int, dtype, prefix: Prefix | None) -> KVCache:
        """A cache for params with that prefix (`params.get("prefix")`): each row begins with it.

        Args:
            size: slots of a row for tokens; those of the prefix come on top.
        """
        if prefix is None:
            return cls.zeros(config, batch, size, dtype)
        P = prefix.length
        empty = cls.zeros(config, batch, P + size, dtype)
        return cls(
            k=empty.k.at[:, :, :P].set(prefix.k[:, None].astype(dtype)),
            v=empty.v.at[:, :, :P].set(prefix.v[:, None].astype(dtype)),
            length=jnp.full(batch, P, jnp.int32),
            prefix=jnp.full(batch, P, jnp.int32),
        ).pinned()

    @property
    def size(self) -> int:
        """S, slots of a row."""
        return self.k.shape[2]


def write_layer(cache: jax.Array, new: jax.Array, layer: jax.Array, slots: jax.Array) -> jax.Array:
    """Writes [B, T, K, H] into the slots of one layer of [L, B, S, K, H], in one scatter."""
    if not active_mesh():
        rows = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
        return cache.at[layer, rows, slots].set(new, mode="drop", unique_indices=True)
    # Either form keeps rows where they lie on its platforms. The partitioner of jaxlib sends those
    # of the plain one between devices; the compiler of TPUs copies the cache for the other. Left
    # alone, it also transposes the whole cache twice a layer where several tokens are written.
    forms = {
        "tpu": lambda *args: _rows_first(_scatter(*args)),
        "default": partial(_scatter, rows_apart=True),
    }
    new = new.astype(cache.dtype)
    return constrain(jax.lax.platform_dependent(cache, new, layer, slots, **forms), *AXES["k"])


def _scatter(cache, new, layer, slots, rows_apart: bool = False) -> jax.Array:
    """`write_layer` as one scatter whose rows count up, or (`rows_apart`) one for each row."""
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3),
        inserted_window_dims=(0, 2) if rows_apart else (0, 1, 2),
        scatter_dims_to_operand_dims=(0, 2) if rows_apart else (0, 1, 2),
        operand_batching_dims=(1,) if rows_apart else (),
        scatter_indices_batching_dims=(0,) if rows_apart else (),
    )
    rows = [] if rows_apart else [jax.lax.broadcasted_iota(jnp.int32, slots.shape, 0)]
    places = jnp.stack([jnp.full_like(slots, layer), *rows, slots], axis=-1)
    drop = jax.lax.GatherScatterMode.FILL_OR_DROP
    return jax.lax.scatter(cache, places, new, dimensions, unique_indices=True, mode=drop)


def read_layer(cache: jax.Array, layer: jax.Array) -> jax.Array:
    """One layer of [L, B, S, K, H]: [B, S, K, H]."""
    slots = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
    slots = constrain(slots, *"BSKH")
    # Left alone, XLA:GPU transposes the whole cache, to a layout that its dots like better, at the
    # beginning of every program and back at its end; the compiler of TPUs does so in every layer
    # where several tokens of several rows, or very many of one, are read.
    return jax.lax.platform_dependent(slots, cpu=lambda x: x, default=_rows_first)


def _rows_first(x: jax.Array) -> jax.Array:
    """The same array, which lies in memory in the order of its axes."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
