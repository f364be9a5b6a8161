"""Runs a small random model on a mesh and compares its answer with that of one device.

    python examples/sharding/model.py --mesh data=2,tensor=4 [--layers 2]

It prints how arrays are sharded, and the collectives of a decode step. Without other devices, or
with JAX_PLATFORMS=cpu, it computes on as many virtual ones of the CPU as the mesh takes.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from program import collectives

from glm2_jax import (
    GLMConfig,
    GLMError,
    KVCache,
    check_mesh,
    last_logits,
    make_mesh,
    param_shapes,
    params_sharding,
    parse_mesh,
)

ROWS, PROMPT, SLOTS, STEPS = 8, 6, 16, 4


def config_of(layers: int) -> GLMConfig:
    """Return a small model whose heads, ffn and vocabulary a tensor axis of 8 divides."""
    return GLMConfig(layers, 256, 64, 96, 8, 2, 16, 64)


def random_params(config: GLMConfig) -> Any:
    """Make random weights on one device."""
    random = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(random.normal(0, 0.3, shape), jnp.float32)

    return jax.tree.map(draw, param_shapes(config), is_leaf=lambda x: isinstance(x, tuple))


def read(config: GLMConfig, params: Any, tokens: jax.Array, cache: KVCache) -> tuple[Any, Any]:
    """Read some tokens of every row: (the most likely next ones [B, 1], the cache)."""
    last = jnp.full(tokens.shape[0], tokens.shape[1] - 1)
    logits, longer = last_logits(config, params, tokens, last, cache=cache)
    return jnp.argmax(logits, -1)[:, None].astype(jnp.int32), longer


step = jax.jit(read, static_argnums=0, donate_argnums=3)


def answer(config: GLMConfig, params: Any) -> tuple[np.ndarray, tuple[jax.Array, KVCache]]:
    """Return greedy tokens [B, STEPS] after a prompt, and the input of the next step.

    The same code runs with a mesh and without one.
    """
    random = np.random.default_rng(1)
    tokens = jnp.asarray(random.integers(0, config.vocab_size, (ROWS, PROMPT)), jnp.int32)
    cache = KVCache.zeros(config, ROWS, SLOTS, jnp.float32)
    seen = []
    for _ in range(STEPS):
        tokens, cache = step(config, params, tokens, cache)
        seen.append(np.asarray(tokens))
    return np.concatenate(seen, axis=1), (tokens, cache)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh", default="data=2,tensor=4", type=parse_mesh)
    parser.add_argument("--layers", default=2, type=int)
    args = parser.parse_args()
    count = math.prod(args.mesh.values())
    jax.config.update("jax_num_cpu_devices", count)  # before jax looks for devices
    config = config_of(args.layers)
    mesh = make_mesh(args.mesh, jax.devices()[:count])
    check_mesh(config, mesh)

    params = random_params(config)
    want, _ = answer(config, params)

    # All that a mesh needs: sharded parameters, and the mesh set while computing.
    placed = jax.device_put(params, params_sharding(config, mesh))
    with jax.set_mesh(mesh):
        got, (token, cache) = answer(config, placed)
        program = step.lower(config, placed, token, cache).compile()  # as it was called
    np.testing.assert_array_equal(got, want)

    print(f"{dict(mesh.shape)}: the {want.size} tokens of one device\n")
    arrays = {name: placed[name] for name in ("embed", "final_norm", "head")}
    arrays |= {f"layers/{name}": array for name, array in placed["layers"].items()}
    arrays |= {"cache.k": cache.k, "cache.length": cache.length}
    for name, array in arrays.items():
        part = array.sharding.shard_shape(array.shape)
        print(f"{name:16} {array.shape!s:18} per device {part!s:18} {array.sharding.spec}")
    print("\nthe head [V, D], and which devices have which rows of it:")
    jax.debug.visualize_array_sharding(placed["head"])
    print("the collectives of a decode step; one inside the loop over the layers is listed once:")
    for kind, size in collectives(program.as_text() or ""):
        print(f"  {kind} of {size:,} bytes")


if __name__ == "__main__":
    try:
        main()
    except GLMError as error:
        raise SystemExit(str(error)) from None
