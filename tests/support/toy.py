"""Toy models and plain counterparts that the tests of the model share."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, compiler_options, forward, init_params
from glm2_jax.quant import QTensor, dequantize, quantize
from glm2_jax.schemes import COLUMN_AXES, Scheme

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
jit_dequantize = jax.jit(dequantize, static_argnums=1)


@functools.cache
def toy_params(config: GLMConfig = TOY, seed: int = 0):
    """Random weights of unit-scale logits, biases and norms included."""
    random = np.random.default_rng(seed)

    def draw(path, x):
        return jnp.asarray(random.normal("norm" in path[-1].key, 0.1, x.shape), x.dtype)

    return jax.tree.map_with_path(draw, abstract_params(config))


def abstract_params(config: GLMConfig):
    """Shapes and types of the params, for programs that are compiled and not run."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def random_tokens(rows: int, length: int, config: GLMConfig = TOY, seed: int = 0) -> jax.Array:
    """int32 [rows, length] of ids above the special ones."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(3, config.vocab_size, (rows, length)), jnp.int32)


def quantized(params, scheme: Scheme):
    """The params with the layers' matrices as QTensors, and those matrices as float32 again."""
    small, large = dict(params["layers"]), dict(params["layers"])
    for name, axes in COLUMN_AXES.items():
        weight = np.asarray(params["layers"][name])
        values, scale = quantize(weight.reshape(-1, math.prod(weight.shape[-axes:])), scheme)
        shapes = scheme.shapes(weight.shape, axes)
        values, scale = values.reshape(shapes[0]), scale.reshape(shapes[1])
        small[name] = QTensor(jnp.asarray(values), jnp.asarray(scale), scheme.bits)
        plain = jit_dequantize(small[name], weight.ndim - axes)
        large[name] = jnp.asarray(np.asarray(plain).reshape(weight.shape))
    return {**params, "layers": small}, {**params, "layers": large}
