"""The toy model on meshes of eight virtual devices: the same answers, and no needless talk.

This file is also the script that `run` starts: one process makes all the checks.
"""

from __future__ import annotations

import json
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
ROWS, SLOTS, STEPS, WIDEST = 8, 16, 3, 3


class Case(NamedTuple):
    """A mesh, and what runs on it."""

    mesh: str
    scheme: str | None
    as_list: bool  # of layers
    adapted: bool
    width: int  # tokens of a prompt, and of a row of the program
    cache_part: list[int]  # on one device


CASES = [
    Case("tensor=8", None, False, False, 1, [2, 8, 16, 2, 16]),  # two heads are on all of eight
    Case("data=2,tensor=4", "int4", False, True, 3, [2, 4, 16, 2, 16]),
    Case("data=2,tensor=4", None, True, False, 1, [2, 4, 16, 2, 16]),
    Case("tensor=2,data=2,fsdp=2", "int8", False, False, 3, [2, 2, 16, 1, 16]),
    Case("data=8", "int8", False, True, 1, [2, 1, 16, 2, 16]),
]


@partial(jax.jit, donate_argnames="cache")
def step(params: Any, tokens: jax.Array, lengths: jax.Array, cache: KVCache):
    """Read some tokens of every row: (logits, the most likely tokens, the cache)."""
    real = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    logits, new = last_logits(CONFIG, params, tokens, lengths - 1, segment_ids=real, cache=cache)
    return logits, jnp.argmax(logits, -1).astype(jnp.int32), new


@cache
def weights(scheme: str | None) -> tuple[Any, Any]:
    """The params, and what they stand for in float32: one program answers for all schemes."""
    params = toy_params(CONFIG)
    pair = (params, params) if scheme is None else quantized(params, SCHEMES[scheme])
    return jax.tree.map(np.asarray, pair)


@cache
def adapter() -> Any:
    shapes = jax.eval_shape(
        lambda: init_lora(CONFIG, jax.random.key(3), rank=4, targets="all-linear")
    )
    random = np.random.default_rng(4)
    return jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(x.dtype), shapes)


def answer(program: Any, params: Any, state: KVCache, prompt: int, width: int) -> Any:
    """Prompts of 1 .. `prompt` tokens and a few greedy steps, by a program for `width` tokens of
    every row: (logits, tokens, the cache)."""
    read = np.zeros((ROWS, width), np.int32)
    read[:, :prompt] = random_tokens(ROWS, prompt, CONFIG)
    lengths, seen = np.arange(ROWS, dtype=np.int32) % prompt + 1, []
    for _ in range(STEPS + 1):
        logits, tokens, state = program(params, read, lengths, state)
        seen.append((np.asarray(logits), np.asarray(tokens)))
        read[:, 0], lengths = seen[-1][1], np.ones_like(lengths)
    return np.stack([x for x, _ in seen]), np.stack([x for _, x in seen]), state


def compare(case: Case) -> dict[str, Any]:
    """One case: how far from one device, and the collectives of its program."""

    def empty() -> KVCache:
        return KVCache.zeros(CONFIG, ROWS, SLOTS, jnp.float32)

    plain = weights(case.scheme)[1]
    plain = with_lora(plain, adapter()) if case.adapted else plain
    want, want_tokens, _ = answer(step, plain, empty(), case.width, WIDEST)
    mesh = make_mesh(parse_mesh(case.mesh))
    params = weights(case.scheme)[0]
    params = unstack_layers(params) if case.as_list else params
    scheme = SCHEMES[case.scheme] if case.scheme else None
    places = params_sharding(CONFIG, mesh, scheme=scheme, as_list=case.as_list)
    params = jax.device_put(params, places)
    if case.adapted:
        lora = jax.device_put(adapter(), lora_sharding(adapter(), mesh))
        params = with_lora(params, lora)
    with jax.set_mesh(mesh):
        read = np.zeros((ROWS, case.width), np.int32), np.ones(ROWS, np.int32)
        # Compiled for this sharding of the cache, which its result must have as well.
        program = step.lower(params, *read, empty()).compile()
        got, got_tokens, state = answer(program, params, empty(), case.width, case.width)
    found = collectives(program.as_text() or "")
    return {
        "logits": float(np.abs(got - want).max()),
        "scale": float(np.abs(want).max()),
        "same_tokens": bool((got_tokens == want_tokens).all()),
        "tokens": len(set(want_tokens.flat)),
        "layers": kinds(found, True),
        "outside": kinds(found, False),
        "largest": max(one.elements for one in found) if found else 0,
        "cache_part": state.k.addressable_shards[0].data.shape,
        "cache_stays": state.k.sharding.is_equivalent_to(cache_sharding(CONFIG, mesh).k, 5),
    }


@pytest.fixture(scope="module")
def found():
    return list(zip(CASES, run("tests.glm2_jax.test_sharding_model"), strict=True))


def test_meshes_give_the_logits_and_tokens_of_one_device(found):
    for case, one in found:
        assert one["scale"] > 0.5 and one["logits"] <= 1e-4, case
        assert one["same_tokens"] and one["tokens"] > 5, case
        # Rows and key heads of the cache are cut, and stay.
        assert one["cache_part"] == case.cache_part and one["cache_stays"], case


def test_a_layer_has_two_all_reduces_and_nothing_else(found):
    for case, one in found:
        if case.mesh == "data=8":
            assert one["layers"] == one["outside"] == {}, case
        elif "fsdp" not in case.mesh:
            # Outside the loop: rows of the embedding, logits; and the layers where they are a list.
            layers = 2 * 2 if case.as_list else 0
            assert one["layers"] == ({} if case.as_list else {"all-reduce": 2}), case
            assert one["outside"] == {"all-reduce": 1 + layers, "all-gather": 1}, case
            # Logits, or hidden states: no weight, no cache.
            assert one["largest"] == case.cache_part[1] * max(104, 64 * case.width), case


if __name__ == "__main__":
    print(json.dumps([compare(case) for case in CASES]))
