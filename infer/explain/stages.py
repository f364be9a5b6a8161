"""The model stage by stage: the walk that shapes, costs and values are taken from.

Axis letters as in `glm2_jax.model`, whose parts are called here one after another. It is only used
to explain; a test compares it with `glm2_jax.forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from glm2_jax import GLMConfig
from glm2_jax.attention import scaled_scores
from glm2_jax.cache import read_layer, write_layer
from glm2_jax.context import TokenContext
from glm2_jax.linear import biased, einsum, project
from glm2_jax.model import GLM, GLMBlock
from glm2_jax.norms import ACTIVATIONS, norm
from glm2_jax.rope import apply_rope

# Called with a stage's name, its function and the function's arrays; returns the result.
Take = Callable[..., Any]


def call(name: str, function: Callable[..., Any], *arrays: Any) -> Any:
    """Compute a stage: the simplest `Take`."""
    return function(*arrays)


def walk_layer(
    config: GLMConfig,
    weights: Any,
    x: jax.Array,
    context: TokenContext,
    cache: tuple[jax.Array, jax.Array] | None,
    take: Take = call,
) -> jax.Array:
    """Walk through one layer: [B, T, D] -> [B, T, D].

    `cache` has keys and values of the tokens before, [1, B, K, S, H] each; None = there are none.
    """

    def normed(stage: str, name: str, x: jax.Array) -> jax.Array:
        return take(stage, lambda x, weights: norm(config, weights, name, x), x, weights)

    def added(part: str, name: str, x: jax.Array, a: jax.Array, out: jax.Array) -> jax.Array:
        """Add what a part gave to the residual, as the family does it."""
        if config.block.sandwich:
            out = normed(f"{part}.post_norm", name, out)
        block, variables = GLMBlock(config), {"params": weights}
        add = partial(block.apply, variables, method="add")
        return take(f"{part}.add", add, x, a, out)

    a = normed("attention.norm", "attn_norm", x)
    out = _attention(weights, a, context, cache, take)
    x = added("attention", "attn_post_norm", x, a, out)
    u = normed("mlp.norm", "mlp_norm", x)
    out = _mlp(config, weights, u, take)
    return added("mlp", "mlp_post_norm", x, u, out)


def _mlp(config: GLMConfig, weights: Any, x: jax.Array, take: Take) -> jax.Array:
    def gate_up(x: jax.Array, weight: Any, bias: jax.Array | None) -> jax.Array:
        return biased(einsum("BTD,CFD->BTCF", x, weight), bias)

    def activation(both: jax.Array) -> jax.Array:
        return ACTIVATIONS[config.block.mlp](both).astype(x.dtype)

    both = take("mlp.gate_up", gate_up, x, weights["gate_up"], weights.get("gate_up_bias"))
    hidden = take("mlp.act", activation, both)
    down = partial(project, "BTF,DF->BTD", added=None)
    return take("mlp.down", down, hidden, weights["down"], weights.get("down_bias"))


def _attention(weights: Any, x: jax.Array, context: TokenContext, cache: Any, take: Take):
    q, k, v = (
        take(
            f"attention.{name}", partial(project, spec, added=None),
            x, weights[name], weights.get(f"{name}_bias"),
        )
        for name, spec in (("q", "BTD,NHD->BTNH"), ("k", "BTD,KHD->BTKH"), ("v", "BTD,KHD->BTKH"))
    )  # fmt: skip
    if context.cos is not None:
        q = take("attention.rope_q", _rotate_queries, q, context)
        k = take("attention.rope_k", _rotate, k, context)
    if cache is not None:
        k, v = take("attention.cache", _through_cache, k, v, *cache, context)
    else:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = take("attention.scores", _all_scores, q, k, context)
    probs = take("attention.softmax", partial(jax.nn.softmax, axis=-1), scores)
    out = take("attention.values", partial(_weighted, dtype=x.dtype), probs, v)
    to_stream = partial(project, "BTNH,DNH->BTD", added=None)
    return take("attention.o", to_stream, out, weights["o"], weights.get("o_bias"))


def walk_head(config: GLMConfig, params: Any, x: jax.Array, take: Take = call) -> jax.Array:
    """Apply final norm and head: [..., D] -> float32 [..., V]."""
    x = take("norm", lambda x, params: norm(config, params, "final_norm", x), x, params)
    return take("head", partial(einsum, "...D,VD->...V"), x, params[config.block.head])


def embed(config: GLMConfig, params: Any, tokens: jax.Array, context: TokenContext) -> jax.Array:
    """Look up tokens [B, T] -> [B, T, D], the input of the first layer."""
    return GLM(config).apply({"params": params}, tokens, context, None, method=GLM.carry)[0]


def _rotate(x: jax.Array, context: TokenContext) -> jax.Array:
    assert context.cos is not None and context.sin is not None
    return apply_rope(x, context.cos, context.sin)


def _rotate_queries(q: jax.Array, context: TokenContext) -> jax.Array:
    q = _rotate(q, context)
    return q if context.query_scale is None else (q * context.query_scale).astype(q.dtype)


def _through_cache(
    k: jax.Array, v: jax.Array, ks: Any, vs: Any, context: TokenContext
) -> tuple[Any, Any]:
    """Write new keys and values after the old ones; returns all, [B, K, S, H] each."""
    assert context.slots is not None
    layer = jnp.int32(0)
    ks, vs = write_layer(ks, k, layer, context.slots), write_layer(vs, v, layer, context.slots)
    return read_layer(ks, layer), read_layer(vs, layer)


def _all_scores(q: jax.Array, k: jax.Array, context: TokenContext) -> jax.Array:
    """Return the scores [B, N, T, S]; masked ones are the lowest number."""
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    scores = scaled_scores(q.reshape(B, T, K, N // K, H), k, context.visible.mask(0, S))
    return scores.reshape(B, N, T, S)


def _weighted(probs: jax.Array, v: jax.Array, dtype: Any) -> jax.Array:
    """Weight the values: [B, N, T, S] and [B, K, S, H] -> [B, T, N, H]."""
    B, N, T, S = probs.shape
    K, H = v.shape[1], v.shape[3]
    grouped = probs.reshape(B, K, N // K, T, S).astype(v.dtype)
    out = einsum("BKGTS,BKSH->BKGTH", grouped, v)
    return jnp.einsum("BKGTH->BTKGH", out).reshape(B, T, N, H).astype(dtype)
