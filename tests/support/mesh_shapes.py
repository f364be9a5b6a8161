"""Programs of real shapes, compiled for devices that need not be here."""

import importlib.util
import os
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import glm2_jax
from glm2_jax import GLMConfig, KVCache, compiler_options, last_logits
from glm2_jax.schemes import SCHEMES
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params
from tests.support.shared_data import shared_path

OPTIONS = {"cpu": compiler_options("cpu"), "cuda": {"xla_gpu_autotune_level": 0}, "tpu": {}}


def devices_of(topology: str) -> Any:
    """The devices of "v5e:2x4" or "h200:1x1x8"; skips the test without their compiler."""
    plugin = "jax_cuda13_plugin" if topology.startswith("h200") else "libtpu"
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed")
    if plugin == "libtpu":
        return topologies.get_topology_desc(topology, "tpu").devices
    text = shared_path("h200_target_config.txt").read_text()
    name, _, shape = topology.partition(":")
    return topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology=shape, target_config=text
    ).devices


def device(platform: str) -> Any:
    """A device to compile for: the CPU, an H200, or one chip of a TPU v5e; skips without."""
    if platform == "cpu":
        return jax.devices("cpu")[0]
    return devices_of({"cuda": "h200:1x1x1", "tpu": "v5e:1x1"}[platform])[0]


def int32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def put(tree: Any, shardings: Any) -> Any:
    """Abstract arrays at their places; a single place is that of all."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda x: shardings, tree)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
    )


def compiled(platform: str, function, *args: Any, donate: int | tuple[int, ...]) -> Any:
    """The program of a function for a device of a platform."""
    args = put(args, SingleDeviceSharding(device(platform)))
    lowered = jax.jit(function, donate_argnums=donate).lower(*args)
    return lowered.compile(compiler_options=OPTIONS[platform])


def lowered(
    config: GLMConfig, mesh: Any, quantize: str | None, rows: int, slots: int, tokens: int
) -> Any:
    """The program that reads `tokens` tokens of every row, to be compiled."""
    scheme = SCHEMES[quantize] if quantize else None
    params = abstract_params(config, Precision("bfloat16", quantize), stacked=True)
    params = put(params, glm2_jax.params_sharding(config, mesh, scheme=scheme))
    cache = jax.eval_shape(lambda: KVCache.zeros(config, rows, slots, jnp.bfloat16))
    cache = put(cache, glm2_jax.cache_sharding(config, mesh))
    text, row = put((int32(rows, tokens), int32(rows)), glm2_jax.rows_sharding(mesh))

    def read(params: Any, tokens: Any, last: Any, cache: KVCache) -> Any:
        return last_logits(config, params, tokens, last, cache=cache)

    with jax.set_mesh(mesh):
        return jax.jit(read, donate_argnums=3).lower(params, text, row, cache)
