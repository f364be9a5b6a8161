"""Programs of real shapes on a mesh of devices that need not be here."""

from typing import Any

import jax
import jax.numpy as jnp

from glm2_jax import (
    GLMConfig,
    KVCache,
    cache_sharding,
    last_logits,
    params_sharding,
    rows_sharding,
)
from glm2_jax.schemes import SCHEMES
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params


def lowered(
    config: GLMConfig, mesh: Any, quantize: str | None, rows: int, slots: int, tokens: int
) -> Any:
    """The program that reads `tokens` tokens of every row, to be compiled."""
    scheme = SCHEMES[quantize] if quantize else None
    params = abstract_params(config, Precision("bfloat16", quantize), stacked=True)
    cache = jax.eval_shape(lambda: KVCache.zeros(config, rows, slots, jnp.bfloat16))

    def put(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.tree.map(put, params, params_sharding(config, mesh, scheme=scheme))
    cache = jax.tree.map(put, cache, cache_sharding(config, mesh))
    cut = rows_sharding(mesh)
    text = jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=cut)
    row = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=cut)

    def forward(params: Any, tokens: Any, last: Any, cache: KVCache) -> Any:
        return last_logits(config, params, tokens, last, cache=cache)

    with jax.set_mesh(mesh):
        return jax.jit(forward, donate_argnums=3).lower(params, text, row, cache)
