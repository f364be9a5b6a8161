"""What one device of a mesh has of a model: its part of the weights and of the cache, in bytes.

Computed from the same shardings that the weights are loaded by, over a mesh that has no devices.
That needs jax, which the plan for one device does not: it is imported where it is used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

from glm2_jax.config import GLMConfig
from glm2_jax.schemes import COLUMN_AXES, EMBEDDINGS, Scheme
from infer.memory.precision import Precision, vector_bytes

Sizes = tuple[tuple[str, int], ...]  # (axis, size) of the mesh, hashable


def sizes_of(mesh: Mapping[str, int]) -> Sizes:
    """Return the sizes of all axes, absent ones being 1."""
    from glm2_jax.mesh import AXES

    return tuple((axis, mesh.get(axis, 1)) for axis in AXES)


def count_devices(mesh: Sizes) -> int:
    return math.prod(size for _, size in mesh)


def row_pieces(mesh: Sizes) -> int:
    """Return into how many pieces the rows of a batch are cut."""
    return dict(mesh)["data"] * dict(mesh)["fsdp"]


@lru_cache
def device_params(config: GLMConfig, precision: Precision, mesh: Sizes) -> Any:
    """Return the params tree as one device has it: shapes and dtypes."""
    import jax

    from glm2_jax.sharding import params_sharding

    def share(array: Any, where: Any) -> Any:
        return jax.ShapeDtypeStruct(where.shard_shape(array.shape), array.dtype)

    places = params_sharding(config, _without_devices(mesh), scheme=precision.scheme)
    return jax.tree.map(share, abstract_params(config, precision), places)


def computed_params(config: GLMConfig, precision: Precision, mesh: Sizes) -> Any:
    """Return the params that one device computes with: what `fsdp` cuts is gathered before."""
    return device_params(config, precision, sizes_of({"tensor": dict(mesh)["tensor"]}))


def total_bytes(tree: Any) -> int:
    """Return the bytes of arrays, or of what their shapes and dtypes stand for."""
    import jax

    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cache_share(config: GLMConfig, size: int, slots: int, rows: int, mesh: Sizes) -> int:
    """Return the bytes of keys and values on each device, `size` bytes a number, of a cache with
    `slots` for each of `rows` on all devices together."""
    from glm2_jax.sharding import cache_sharding

    where: Any = cache_sharding(config, _without_devices(mesh)).k
    shape = (config.num_layers, rows, config.num_kv_heads, slots, config.head_dim)
    vectors = math.prod(where.shard_shape(shape)[:-1])
    return 2 * vectors * vector_bytes(config.head_dim, size)


def share_of(config: GLMConfig, mesh: Sizes) -> GLMConfig:
    """Return the model as wide as one device computes it, rounded up to complete groups of
    heads."""
    cut = dict(mesh)["tensor"]
    heads = config.num_kv_heads // (cut if config.num_kv_heads % cut == 0 else 1)
    return dataclasses.replace(
        config,
        num_heads=-(-config.num_heads // cut // heads) * heads,
        num_kv_heads=heads,
        ffn_hidden_size=config.ffn_hidden_size // cut,
    )


def _without_devices(mesh: Sizes) -> Any:
    from jax.sharding import AbstractMesh

    return AbstractMesh(tuple(size for _, size in mesh), tuple(axis for axis, _ in mesh))


def abstract_params(config: GLMConfig, precision: Precision, *, stacked: bool = True) -> Any:
    """Return the params tree as shapes, as an engine would hold it."""
    import jax
    import jax.numpy as jnp

    from glm2_jax import init_params

    init = partial(init_params, config, jax.random.key(0), jnp.dtype(precision.dtype))
    params = jax.eval_shape(init)
    layers, scheme = dict(params["layers"]), precision.scheme
    if scheme is not None:
        layers |= {n: _quantized(layers[n].shape, axes, scheme) for n, axes in COLUMN_AXES.items()}
        if scheme.embeddings:
            params = {
                **params,
                **{
                    n: _quantized(params[n].shape, 1, scheme.of(n))
                    for n in EMBEDDINGS
                    if n in params
                },
            }
    if stacked:
        return {**params, "layers": layers}
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), layers)
    return {**params, "layers": [one] * config.num_layers}


def _quantized(shape: tuple[int, ...], axes: int, scheme: Scheme) -> Any:
    import jax

    from glm2_jax.quant import QTensor

    values, scale = scheme.shapes(shape, axes)
    integers: Any = jax.ShapeDtypeStruct(values, "int8")
    scales: Any = jax.ShapeDtypeStruct(scale, "float32")
    return QTensor(integers, scales, scheme.bits)
