"""A step that trains an adapter of the 6B model on eight chips that are not here, compiled."""

import importlib.util
import math
import os
from functools import partial
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from glm2_jax import (
    PRESETS,
    init_lora,
    lora_sharding,
    make_mesh,
    params_sharding,
    replicated,
)
from glm2_jax.schemes import SCHEMES
from infer.memory.cards import LINKS
from infer.memory.mesh_cost import mesh_cost
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params
from tests.support.program_text import READABLE, collectives
from train.data.batch import Batch
from train.devices import state_sharding
from train.optim import make_optimizer
from train.step import init_state, train_step

CONFIG = PRESETS["chatglm2-6b"]
GB = 10**9
BATCHES, ROWS, TOKENS = 2, 8, 512

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def chips(topology: str, sizes: dict[str, int]) -> Any:
    """A mesh of devices that are not here."""
    return make_mesh(sizes, topologies.get_topology_desc(topology, "tpu").devices)


def compiled(topology: str, sizes: dict[str, int], quantize: str | None) -> Any:
    """The step of `train.lora` with its own rank and targets."""
    mesh = chips(topology, sizes)
    scheme = SCHEMES[quantize] if quantize else None
    base = abstract_params(CONFIG, Precision("bfloat16", quantize), stacked=True)
    lora = jax.eval_shape(partial(init_lora, CONFIG, dropout=0.1), jax.random.key(0))
    optimizer = make_optimizer(5e-5)

    def put(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    whole = replicated(mesh)
    base = jax.tree.map(put, base, params_sharding(CONFIG, mesh, scheme=scheme))
    lora = jax.tree.map(put, lora, lora_sharding(lora, mesh))
    places = state_sharding(optimizer, lora, mesh)
    state = jax.tree.map(put, jax.eval_shape(partial(init_state, optimizer), lora), places)
    rows = NamedSharding(mesh, PartitionSpec(None, "data" if sizes.get("data") else None))
    shape = (BATCHES, ROWS, TOKENS)
    kinds = (jnp.int32, jnp.int32, jnp.int32, jnp.bool_)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, kind, sharding=rows) for kind in kinds))
    key = put(jax.eval_shape(lambda: jax.random.key(0)), whole)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    step = jax.jit(
        partial(train_step, CONFIG, optimizer),
        donate_argnums=(1, 2),
        out_shardings=(lora_sharding(lora, mesh), places, whole),
    )
    with jax.set_mesh(mesh):
        return step.lower(base, lora, state, batch, key, number).compile(compiler_options=READABLE)


@pytest.mark.parametrize(
    ("topology", "sizes"), [("v5e:2x4", {"data": 2, "tensor": 4}), ("v5p:2x2x2", {"tensor": 8})]
)
def test_the_step_of_an_adapter_moves_no_weight(topology, sizes):
    program = compiled(topology, sizes, None)
    found = collectives(program.as_text() or "")
    rows, layers = ROWS // sizes.get("data", 1), CONFIG.num_layers
    state = rows * TOKENS * CONFIG.hidden_size
    assert {one.kind for one in found} == {"all-reduce", "all-gather"}
    # Of a layer two forward, two backward, and one of those again; and the embedding of a batch.
    reduced = [one.times for one in found if one.kind == "all-reduce" and one.elements == state]
    assert sorted(reduced) == [BATCHES] + [BATCHES * layers] * 5
    assert max(one.elements for one in found) == state
    # Gradients of keys and values, two heads for more devices: no weight is gathered.
    gathered = {one.elements for one in found if one.kind == "all-gather"}
    assert gathered == {rows * TOKENS * CONFIG.num_kv_heads * CONFIG.head_dim}
    memory = program.memory_analysis()
    print(
        f"{topology} {sizes}: {memory.argument_size_in_bytes / GB:.2f} GB,"
        f" {memory.temp_size_in_bytes / GB:.2f} GB more"
    )
    assert memory.temp_size_in_bytes / GB < 1.5
    adapter = 3 * 4 * lora_elements(chips(topology, sizes))  # with Adam's moments
    assert memory.alias_size_in_bytes == pytest.approx(adapter, rel=1e-3)  # updated in place
    # What the model of costs says of the same mesh; it leaves out the adapter and its gradients,
    # and those of keys and values.
    links = LINKS[topology.split(":")[0]]
    cost = mesh_cost(CONFIG, sizes, links, batch=ROWS, length=TOKENS)
    assert memory.argument_size_in_bytes == pytest.approx(cost.weights + adapter, rel=1e-3)
    sent, expected = sum(one.sent for one in found), BATCHES * cost.steps["lora"].talk.link_bytes
    assert expected < sent < 1.03 * expected


def lora_elements(mesh: Any) -> int:
    """Numbers of the adapter on one device."""
    lora = jax.eval_shape(partial(init_lora, CONFIG), jax.random.key(0))
    places = lora_sharding(lora, mesh)
    counts = jax.tree.map(lambda x, put: math.prod(put.shard_shape(x.shape)), lora, places)
    return sum(jax.tree.leaves(counts))
