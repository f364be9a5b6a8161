"""The key/value cache, whose shape never changes: floats, or int8 with a scale for each vector."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from glm2_jax.blanks import Blanks
from glm2_jax.config import GLMConfig
from glm2_jax.mesh import active_mesh, constrain
from glm2_jax.prefix import Prefix
from glm2_jax.quant import QTensor, quantize_vectors

# Letters of `glm2_jax.model`; without those of a bidirectional context, which are all [B]. Scales
# have all but the last.
AXES = {"k": "LBKSH", "v": "LBKSH", "length": "B", "prefix": "B"}

Stored = jax.Array | QTensor  # floats, or int8 with a scale for each vector [H]


@flax.struct.dataclass
class Noted:
    """Keys, and numbers that an idea notes of each: see `glm2_jax.ideas`."""

    stored: Stored
    notes: dict[str, jax.Array]  # float32 [L, B, K, S], or those of one layer

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the keys."""
        return self.stored.shape


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer for a batch of rows, each with its own length.

    Slots 0 .. length - 1 of a row are written; later slots never reach a result. Setting the
    `length` of a row to its `prefix` frees the row for another sequence.
    """

    k: Stored | Noted  # [L, B, K, S, H], already rotated
    v: Stored  # [L, B, K, S, H], always finite: see `glm2_jax.attention.finite_values`
    length: jax.Array  # int32 [B], written slots
    prefix: jax.Array  # int32 [B], leading slots that have no position (prefix tuning)
    # Where the blanks of each row are; None for families with a causal context.
    blanks: Blanks | None = None

    @classmethod
    def zeros(cls, config: GLMConfig, batch: int, size: int, dtype) -> KVCache:
        """Make an empty cache of `batch` rows with `size` slots, sharded over an active mesh.

        With the dtype int8 keys and values are quantized. It is zeros, not uninitialized memory: an
        unseen value is multiplied by a probability of 0, and 0 * NaN is NaN.
        """
        shape = (config.num_layers, batch, config.num_kv_heads, size, config.head_dim)

        def stored() -> Stored:
            zeros = jnp.zeros(shape, dtype)
            if dtype != jnp.int8:
                return zeros
            return QTensor(zeros, jnp.zeros(shape[:-1], jnp.float32), 8)

        def make() -> KVCache:
            notes = {name: jnp.zeros(shape[:-1], jnp.float32) for name in config.idea.notes}
            return cls(
                k=Noted(stored(), notes) if notes else stored(),
                v=stored(),
                length=jnp.zeros(batch, jnp.int32),
                prefix=jnp.zeros(batch, jnp.int32),
                blanks=Blanks.none(batch) if config.block.bidirectional else None,
            ).pinned()

        return jax.jit(make)() if active_mesh() else make()  # jit: never all on one device

    def pinned(self) -> KVCache:
        """Constrain the cache to the active mesh, as `glm2_jax.sharding.cache_sharding` says."""
        pinned = {name: _pinned(getattr(self, name), axes) for name, axes in AXES.items()}
        blanks = jax.tree.map(lambda x: constrain(x, "B"), self.blanks)
        return dataclasses.replace(self, **pinned, blanks=blanks)

    @classmethod
    def new(cls, config: GLMConfig, batch: int, size: int, dtype, prefix: Prefix | None) -> KVCache:
        """Make a cache whose rows begin with a prefix, that of the params or None.

        The slots of the prefix come on top of the `size` for tokens.
        """
        if prefix is None:
            return cls.zeros(config, batch, size, dtype)
        P = prefix.length
        empty = cls.zeros(config, batch, P + size, dtype)

        def begun(empty: Any, prefix: jax.Array) -> Any:
            if isinstance(empty, Noted):
                return Noted(begun(empty.stored, prefix), empty.notes)
            new = _as_stored(prefix.swapaxes(1, 2)[:, None], empty)
            return jax.tree.map(lambda x, new: x.at[:, :, :, :P].set(new), empty, new)

        return dataclasses.replace(
            empty,
            k=begun(empty.k, prefix.k),
            v=begun(empty.v, prefix.v),
            length=jnp.full(batch, P, jnp.int32),
            prefix=jnp.full(batch, P, jnp.int32),
        ).pinned()

    @property
    def size(self) -> int:
        """S, the slots of a row."""
        return self.k.shape[3]


def _pinned(x: Any, axes: str) -> Any:
    return jax.tree.map(lambda array: constrain(array, *axes[: array.ndim]), x)


def write_notes(
    keys: Noted, notes: dict[str, jax.Array], layer: Any, rows: jax.Array | None
) -> Noted:
    """Write the notes of one layer, [R, K, view] each; `rows` as in `write_layer`."""
    rows_ = slice(None) if rows is None else rows

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[layer, rows_, :, : new.shape[-1]].set(new, mode="drop")

    return Noted(keys.stored, jax.tree.map(write, keys.notes, notes))


def _as_stored(new: jax.Array, cache: Stored) -> Stored:
    """Return floats [..., H] as a cache keeps them."""
    return quantize_vectors(new) if isinstance(cache, QTensor) else new.astype(cache.dtype)


def write_layer(
    cache: Any,
    new: jax.Array,
    layer: jax.Array,
    slots: jax.Array,
    rows: jax.Array | None = None,
) -> Any:
    """Write [R, T, K, H] into slots [R, T] of one layer of [L, B, K, S, H], in one scatter.

    `rows` are the rows of the cache, int32 [R], None = all. A row or slot past the end is not
    written; no place occurs twice. Notes of these slots become zero.
    """
    write = partial(_write, layer=layer, slots=slots, rows=rows)
    if isinstance(cache, Noted):
        empty = jnp.zeros(new.shape[:-1], jnp.float32)
        notes = jax.tree.map(lambda old: write(old, empty), cache.notes)
        return Noted(write_layer(cache.stored, new, layer, slots, rows), notes)
    return jax.tree.map(write, cache, _as_stored(new, cache))


def _write(
    cache: jax.Array, new: jax.Array, layer: jax.Array, slots: jax.Array, rows: jax.Array | None
) -> jax.Array:
    """Do so for an array: [L, B, K, S, H], or [L, B, K, S] of scales."""
    heads = jnp.arange(cache.shape[2], dtype=jnp.int32)
    if rows is not None or not active_mesh():
        rows = jnp.arange(len(slots), dtype=jnp.int32) if rows is None else rows
        places = cache.at[layer, rows[:, None, None], heads, slots[:, :, None]]
        return _pinned(places.set(new, mode="drop", unique_indices=True), AXES["k"])
    # Each form keeps every row on its device on the platforms it is for. XLA's partitioner moves
    # rows between devices for the first form; the TPU compiler copies the cache for the second, and
    # without a fixed layout it transposes all of it twice per layer if several tokens are written.
    forms = {
        "tpu": lambda *args: _rows_first(_scatter(*args)),
        "default": partial(_scatter, apart=True),
    }
    return _pinned(jax.lax.platform_dependent(cache, new, layer, slots, **forms), AXES["k"])


def _scatter(cache, new, layer, slots, apart: bool = False) -> jax.Array:
    """Scatter with rows and heads as indices that count up, or (`apart`) as batch dimensions."""
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(3, new.ndim)),
        inserted_window_dims=(0, 3) if apart else (0, 1, 2, 3),
        scatter_dims_to_operand_dims=(0, 3) if apart else (0, 1, 2, 3),
        operand_batching_dims=(1, 2) if apart else (),
        scatter_indices_batching_dims=(0, 2) if apart else (),
    )
    shape = new.shape[:3]
    rows = [] if apart else [jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 2)]
    slots = jnp.broadcast_to(slots[:, :, None], shape)
    places = jnp.stack([jnp.full_like(slots, layer), *rows, slots], axis=-1)
    drop = jax.lax.GatherScatterMode.FILL_OR_DROP
    return jax.lax.scatter(cache, places, new, dimensions, unique_indices=True, mode=drop)


def read_layer(
    cache: Any, layer: jax.Array, rows: jax.Array | None = None, view: int | None = None
) -> Any:
    """Return the first `view` slots (None = all) of one layer of [L, B, K, S, H]: [R, K, view, H].

    `rows` are the rows of the cache, int32 [R], None = all. One past the end gives any other's.
    """
    return jax.tree.map(partial(_read, layer=layer, rows=rows, view=view), cache)


def _read(
    cache: jax.Array, layer: jax.Array, rows: jax.Array | None, view: int | None
) -> jax.Array:
    """Do so for an array: [L, B, K, S, H], or [L, B, K, S] of scales."""
    if rows is None:
        sizes = (1, *cache.shape[1:3], view or cache.shape[3], *cache.shape[4:])
        zeros = [jnp.int32(0)] * (cache.ndim - 1)
        starts = (jnp.asarray(layer, jnp.int32), *zeros)  # one type, also in x64
        slots = jax.lax.dynamic_slice(cache, starts, sizes)[0]
    else:
        slots = cache.at[layer, rows, :, :view].get(mode="clip")
    slots = _pinned(slots, "BKSH")
    # Without a fixed layout XLA:GPU transposes the cache at the start of every program, to suit its
    # dots, and back at the end; the TPU compiler does so in every layer of a prefill.
    return jax.lax.platform_dependent(slots, cpu=lambda x: x, default=_rows_first)


def _rows_first(x: jax.Array) -> jax.Array:
    """Return the array with a row-major memory layout."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def take_slots(stored: Stored, slots: jax.Array) -> Stored:
    """Return some slots of one layer of keys or values, [B, K, S, H] -> [B, K, C, H].

    `slots` is int32 [B, K, C], or [B, 1, C] where all heads take the same.
    """

    def take(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, slots.reshape(*slots.shape, *[1] * (x.ndim - 3)), axis=2)

    return jax.tree.map(take, stored)
