"""A step that trains an adapter of the 6B model on eight chips that are not here, compiled."""

import importlib.util
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
from infer.memory.compile_for import abstract_params
from infer.memory.plan import Precision
from tests.program_text import collectives, kinds
from train.batch import Batch
from train.devices import state_sharding
from train.optim import make_optimizer
from train.step import init_state, train_step

CONFIG = PRESETS["chatglm2-6b"]
GB = 10**9
BATCHES, ROWS, TOKENS = 2, 8, 512

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def compiled(topology: str, sizes: dict[str, int], quantize: str | None) -> Any:
    """The step of `train.lora` with its own rank and targets."""
    mesh = make_mesh(sizes, topologies.get_topology_desc(topology, "tpu").devices)
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
        return step.lower(base, lora, state, batch, key, number).compile()


def check(text: str) -> None:
    """What devices tell each other, where tensor = 8: of activations alone."""
    found = collectives(text)
    state = ROWS * TOKENS * CONFIG.hidden_size
    reduced = [one.elements for one in found if one.kind == "all-reduce" and one.looped]
    # Of a layer two forward, two backward, and one of those again; and the embedding of a batch.
    assert reduced.count(state) == 6
    assert max(one.elements for one in found) == state
    # Gradients of keys and values, two heads for eight devices: no weight is gathered.
    gathered = {one.elements for one in found if one.kind == "all-gather"}
    assert gathered == {ROWS * TOKENS * CONFIG.num_kv_heads * CONFIG.head_dim}
    assert set(kinds(found, True)) | set(kinds(found, False)) == {"all-reduce", "all-gather"}


def test_the_step_of_an_adapter_moves_no_weight():
    program = compiled("v5e:2x4", {"tensor": 8}, None)
    check(program.as_text() or "")
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes / GB == pytest.approx(1.68, abs=0.02)
    assert memory.temp_size_in_bytes / GB < 1.5
    assert memory.alias_size_in_bytes > 0.9 * 3 * 4 * lora_elements() / 8  # used up where it lies


def lora_elements() -> int:
    """Numbers of the adapter; with its moments there are three times as many."""
    lora = jax.eval_shape(partial(init_lora, CONFIG), jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(lora))
