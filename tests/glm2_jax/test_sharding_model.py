"""The toy model on meshes of eight virtual devices: the same logits, and no needless talk.

This file is also the script that `run` starts: one process makes all the checks. That the engine
answers on more meshes as on one device is in tests/infer/engine/test_mesh_engine.py.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import (
    GLMConfig,
    KVCache,
    cache_sharding,
    init_lora,
    last_logits,
    lora_sharding,
    make_mesh,
    params_sharding,
    parse_mesh,
)
from glm2_jax.lora import with_lora
from glm2_jax.model import unstack_layers
from glm2_jax.schemes import SCHEMES
from tests.support.mesh_process import run
from tests.support.program_text import collectives, kinds
from tests.support.toy import quantized, random_tokens, toy_params

# Groups of 32 columns in an ffn of 96: on four devices some are on two.
CONFIG = GLMConfig(2, 104, 64, 96, 8, 2, 16, 64)
ROWS, SLOTS, WIDTH = 8, 16, 3
LENGTHS = np.arange(ROWS, dtype=np.int32) % WIDTH + 1

# Mesh, scheme, whether layers are a list, whether there is an adapter, and a device's cache.
CASES = [
    ("data=2,tensor=4", "int4", False, True, [2, 4, 16, 2, 16]),  # two heads are on all of four
    ("tensor=2,data=2,fsdp=2", None, False, True, [2, 2, 16, 1, 16]),
    ("data=2,tensor=4", None, True, False, [2, 4, 16, 2, 16]),
    ("data=8", "int8", False, False, [2, 1, 16, 2, 16]),
]


@partial(jax.jit, donate_argnames="cache")
def step(params: Any, tokens: jax.Array, lengths: jax.Array, cache: KVCache):
    """Read some tokens of every row: (logits, the cache)."""
    real = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    return last_logits(CONFIG, params, tokens, lengths - 1, segment_ids=real, cache=cache)


def answer(program: Any, params: Any, cache: KVCache) -> tuple[np.ndarray, KVCache]:
    """Logits of a prompt of each row and of a step after it, and the cache."""
    tokens = np.array(random_tokens(ROWS, WIDTH, CONFIG))
    first, cache = program(params, tokens, LENGTHS, cache)
    tokens[:, 0] = np.asarray(first).argmax(-1)
    second, cache = program(params, tokens, np.ones_like(LENGTHS), cache)
    return np.stack([first, second]), cache


def compare(text: str, name: str | None, as_list: bool, adapted: bool) -> dict[str, Any]:
    """One case: how far from one device, and the collectives of its program."""
    mesh, scheme = make_mesh(parse_mesh(text)), SCHEMES[name] if name else None
    params = plain = jax.tree.map(np.asarray, toy_params(CONFIG))
    if scheme is not None:
        params, plain = jax.tree.map(np.asarray, quantized(toy_params(CONFIG), scheme))
    params = unstack_layers(params) if as_list else params
    params = jax.device_put(params, params_sharding(CONFIG, mesh, scheme=scheme, as_list=as_list))
    if adapted:
        lora = init_lora(CONFIG, jax.random.key(3), rank=4, targets="all-linear")
        lora = jax.tree.map(lambda x: np.asarray(x + 0.05), lora)
        plain = with_lora(plain, lora)
        params = with_lora(params, jax.device_put(lora, lora_sharding(lora, mesh)))
    want, _ = answer(step, plain, KVCache.zeros(CONFIG, ROWS, SLOTS, jnp.float32))
    with jax.set_mesh(mesh):
        cache = KVCache.zeros(CONFIG, ROWS, SLOTS, jnp.float32)
        # Compiled for this sharding of the cache, which its result must have as well.
        read = np.zeros((ROWS, WIDTH), np.int32)
        program = step.lower(params, read, LENGTHS, cache).compile()
        got, cache = answer(program, params, cache)
    found = collectives(program.as_text() or "")
    return {
        "off": float(np.abs(got - want).max()),
        "scale": float(np.abs(want).max()),
        "layers": kinds(found, True),
        "outside": kinds(found, False),
        "largest": max((one.elements for one in found), default=0),
        "cache_part": cache.k.addressable_shards[0].data.shape,
        "cache_stays": cache.k.sharding.is_equivalent_to(cache_sharding(CONFIG, mesh).k, 5),
    }


def test_meshes_give_the_logits_of_one_device_without_needless_talk():
    for case, one in zip(CASES, run("tests.glm2_jax.test_sharding_model"), strict=True):
        mesh, _, as_list, _, part = case
        assert one["scale"] > 0.5 and one["off"] <= 1e-4, case
        # Rows and key heads of the cache are cut, and stay.
        assert one["cache_part"] == part and one["cache_stays"], case
        if mesh == "data=8":
            assert one["layers"] == one["outside"] == {}, case
        elif "fsdp" not in mesh:
            # Outside the loop: rows of the embedding, logits; and the layers where they are a list.
            listed = 2 * CONFIG.num_layers if as_list else 0
            assert one["layers"] == ({} if as_list else {"all-reduce": 2}), case
            assert one["outside"] == {"all-reduce": 1 + listed, "all-gather": 1}, case
            # Logits, or hidden states: no weight, no cache.
            assert one["largest"] == part[1] * max(CONFIG.vocab_size, 64 * WIDTH), case


if __name__ == "__main__":
    print(json.dumps([compare(*case[:-1]) for case in CASES]))
