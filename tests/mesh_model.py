"""The toy model on meshes of eight devices beside one: run by tests/test_sharding_model.py."""

from __future__ import annotations

import json
import sys
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import (
    GLMConfig,
    KVCache,
    forward,
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
from tests.program_text import collectives, kinds
from tests.toy import quantised, random_tokens, toy_params

# Groups of 32 columns in an ffn of 96: with tensor = 2, 4 and 8 some lie on two devices.
CONFIG = GLMConfig(2, 104, 64, 96, 8, 2, 16, 64)
ROWS, PROMPT, SLOTS, STEPS = 8, 6, 16, 3

# Mesh, scheme, whether layers are a list, whether there is an adapter.
CASES = [
    ("tensor=8", None, False, False),
    ("tensor=8", "int4", True, False),
    ("data=2,tensor=4", "int4", False, True),
    ("data=2,tensor=4", None, True, False),
    ("tensor=2,data=2,fsdp=2", "int8", False, False),
    ("data=2,fsdp=2,tensor=2", "int4-row", True, False),
    ("data=8", "int8", False, True),
]


@partial(jax.jit, donate_argnames="cache")
def step(params: Any, tokens: jax.Array, lengths: jax.Array, cache: KVCache):
    """Reads some tokens of every row: (logits, the most likely tokens, the cache)."""
    real = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    logits, new = last_logits(CONFIG, params, tokens, lengths - 1, segment_ids=real, cache=cache)
    return logits, jnp.argmax(logits, -1).astype(jnp.int32)[:, None], new


@cache
def weights(scheme: str | None) -> tuple[Any, Any]:
    """The params, and what they stand for in float32: one program answers for all schemes."""
    params = toy_params(CONFIG)
    return (params, params) if scheme is None else quantised(params, SCHEMES[scheme])


@cache
def adapter() -> Any:
    lora = init_lora(CONFIG, jax.random.key(3), rank=4, targets="all-linear")
    random = np.random.default_rng(4)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.1, x.shape), x.dtype), lora)


def answer(params: Any) -> tuple[Any, Any, KVCache]:
    """Prompts of different lengths and a few greedy steps: (logits, tokens, the cache)."""
    tokens = random_tokens(ROWS, PROMPT, CONFIG)
    lengths = jnp.asarray(np.arange(ROWS) % 3 + PROMPT - 2, jnp.int32)
    state = KVCache.zeros(CONFIG, ROWS, SLOTS, jnp.float32)
    seen = []
    for _ in range(STEPS + 1):
        logits, tokens, state = step(params, tokens, lengths, state)
        seen.append((np.asarray(logits), np.asarray(tokens)))
        lengths = jnp.ones_like(lengths)
    return np.stack([x for x, _ in seen]), np.stack([x for _, x in seen]), state


@cache
def wanted(scheme: str | None, adapted: bool) -> Any:
    params = weights(scheme)[1]
    return answer(with_lora(params, adapter()) if adapted else params)


def placed(mesh: Any, scheme: str | None, as_list: bool, adapted: bool) -> Any:
    params = weights(scheme)[0]
    params = unstack_layers(params) if as_list else params
    places = params_sharding(
        CONFIG, mesh, scheme=SCHEMES[scheme] if scheme else None, as_list=as_list
    )
    params = jax.device_put(params, places)
    if not adapted:
        return params
    return with_lora(params, jax.device_put(adapter(), lora_sharding(adapter(), mesh)))


def compare(text: str, scheme: str | None, as_list: bool, adapted: bool) -> dict[str, Any]:
    """One case: how far from one device, and the collectives of its programs."""
    want, want_tokens, _ = wanted(scheme, adapted)
    mesh = make_mesh(parse_mesh(text))
    params = placed(mesh, scheme, as_list, adapted)
    before = step._cache_size()
    with jax.set_mesh(mesh):
        got, got_tokens, state = answer(params)
        programs = step._cache_size() - before
        found = collectives(step.lower(*arguments(params, state)).compile().as_text() or "")
    return {
        "mesh": text,
        "scheme": scheme,
        "as_list": as_list,
        "adapted": adapted,
        "logits": float(np.abs(got - want).max()),
        "scale": float(np.abs(want).max()),
        "same_tokens": bool((got_tokens == want_tokens).all()),
        "programs": programs,
        "layers": kinds(found, True),
        "outside": kinds(found, False),
        "largest": max(one.elements for one in found) if found else 0,
        "cache_part": state.k.addressable_shards[0].data.shape,
    }


def arguments(params: Any, state: KVCache) -> tuple[Any, ...]:
    """Of a decode step."""
    return params, jnp.ones((ROWS, 1), jnp.int32), jnp.ones(ROWS, jnp.int32), state


def gradients(params: Any, lora: Any) -> Any:
    """Of a loss by all params and by an adapter."""

    def loss(params: Any, lora: Any) -> jax.Array:
        tokens = random_tokens(ROWS, PROMPT, CONFIG)
        logits, _ = forward(CONFIG, params, tokens, lora=lora)
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], -1).mean()

    return jax.jit(jax.grad(loss, (0, 1)))(params, lora)


def compare_gradients(text: str) -> dict[str, Any]:
    want = gradients(weights(None)[0], adapter())
    mesh = make_mesh(parse_mesh(text))
    params = placed(mesh, None, False, False)
    lora = jax.device_put(adapter(), lora_sharding(adapter(), mesh))
    with jax.set_mesh(mesh):
        got = gradients(params, lora)
    pairs = jax.tree.leaves(jax.tree.map(lambda a, b: (np.asarray(a), np.asarray(b)), want, got))
    off = [float(np.abs(a - b).max()) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    return {
        "mesh": text,
        "arrays": len(off),
        "off": max(off),
        "scale": max(float(np.abs(a).max()) for a in pairs[::2]),
        "smallest_scale": min(float(np.abs(a).max()) for a in pairs[::2]),
    }


def main() -> None:
    meshes = ["data=2,fsdp=2,tensor=2"]
    found: dict[str, Any] = {
        "devices": jax.device_count(),
        "gradients": [compare_gradients(text) for text in meshes],
        "cases": [],
    }
    for case in CASES:
        found["cases"].append(compare(*case))
        print(json.dumps(found["cases"][-1]), file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
