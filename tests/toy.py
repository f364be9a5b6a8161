"""Toy models and plain counterparts that the tests of the model share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, compiler_options, forward, init_params

TOY = GLMConfig(
    num_layers=3,
    vocab_size=97,
    hidden_size=48,
    ffn_hidden_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    seq_length=64,
)

jit_forward = jax.jit(forward, static_argnums=0, compiler_options=compiler_options("cpu"))


@functools.cache
def toy_params(config: GLMConfig = TOY, seed: int = 0):
    """Random weights of unit-scale logits, biases and norms included."""
    params = init_params(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noise)


def random_tokens(rows: int, length: int, config: GLMConfig = TOY, seed: int = 0) -> jax.Array:
    """int32 [rows, length] of ids above the special ones."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(3, config.vocab_size, (rows, length)), jnp.int32)
