"""DoRA (arXiv 2402.09353): an adapter that also learns the length of every row of its matrices.

A row of W becomes magnitude * V / |V| with V = W + scale * B A. Where a part of a target has a
magnitude, "magnitude_q" for q, it is float32 [L, *rows], and 0 for rows that are not adapted. The
layers do not compute norms: they multiply the products, before the bias, by "gain_q", which is
magnitude / |V|.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from glm2_jax.linear import einsum
from glm2_jax.lora import ADAPTED, TARGETS, LoRA, weight_axes
from glm2_jax.parts import TABLE
from glm2_jax.quant import QTensor, dequantize

MAGNITUDE, GAIN = "magnitude_", "gain_"
Rows = Mapping[str, Mapping[str, jax.Array]]  # target -> part -> float32 [L, *rows]


def has_magnitudes(lora: LoRA) -> bool:
    """Return whether an adapter is one of DoRA."""
    return any(name.startswith(MAGNITUDE) for x in lora.layers.values() for name in x)


def with_magnitudes(lora: LoRA, rows: Rows) -> LoRA:
    """Return an adapter with these magnitudes; a new one starts with the `norms` of its base."""
    layers = {
        target: {**weights, **{MAGNITUDE + part: x for part, x in rows[target].items()}}
        for target, weights in lora.layers.items()
    }
    return dataclasses.replace(lora, layers=layers)


def with_gains(lora: LoRA, rows: Rows) -> LoRA:
    """Return an adapter with gains in place of its magnitudes, by the `norms` of it and its base;
    gradients do not go through the norms (section 4.3)."""
    layers = {}
    for target, weights in lora.layers.items():
        found = {name: x for name, x in weights.items() if not name.startswith(MAGNITUDE)}
        for part, norm in rows[target].items():
            magnitude = weights[MAGNITUDE + part]
            adapted = magnitude != 0
            norm = jax.lax.stop_gradient(norm)
            found[GAIN + part] = jnp.where(adapted, magnitude / jnp.where(adapted, norm, 1), 1)
        layers[target] = found
    return dataclasses.replace(lora, layers=layers)


def with_own_gains(params: Mapping[str, Any], lora: LoRA) -> LoRA:
    """Return an adapter as the layers take it, with gains by its norms, if it is one of DoRA."""
    return with_gains(lora, _norms(params, lora)) if has_magnitudes(lora) else lora


def norms(params: Mapping[str, Any], lora: LoRA) -> Rows:
    """Return |V| for every row that an adapter changes; the weights may be quantized, and their
    layers stacked or a list."""
    layers, lora = params["layers"], jax.lax.stop_gradient(lora)
    if isinstance(layers, Mapping):
        weights = {name: layers[name] for name, at in ADAPTED.items() if at[0] in lora.layers}
        return jax.lax.map(lambda both: _of_layer(*both), (weights, lora))
    found = [
        _of_layer(weights, jax.tree.map(lambda x, n=number: x[n], lora))
        for number, weights in enumerate(layers)
    ]
    return jax.tree.map(lambda *each: jnp.stack(each), *found)


def _of_layer(weights: Mapping[str, Any], lora: LoRA) -> dict[str, dict[str, jax.Array]]:
    found: dict[str, dict[str, jax.Array]] = {target: {} for target in lora.layers}
    for name, (target, part) in ADAPTED.items():
        if target in found:
            arrays = lora.layers[target]
            columns = weight_axes(TARGETS[target])["a"].removeprefix("R")
            rows = TABLE[name].axes.removesuffix(columns)
            scale = arrays["scale"] if "scale" in arrays else lora.scale[target]
            update = arrays["a"], scale * arrays[part]
            found[target][part] = _norm(weights[name], rows, columns, *update)
    return found


def _norm(
    weight: jax.Array | QTensor, rows: str, columns: str, a: jax.Array, b: jax.Array
) -> jax.Array:
    """Return |W + B A| over the columns, without the matrix B A: float32 [*rows]."""
    if isinstance(weight, QTensor):
        plain, used = dequantize(weight, len(rows)), a
    else:
        plain, used = weight, a.astype(weight.dtype)
    axes = tuple(range(len(rows), plain.ndim))
    squares = jnp.sum(jnp.square(plain.astype(jnp.float32)), axis=axes)
    mixed = einsum(f"R{columns},{rows}{columns}->R{rows}", used, weight)
    flat = a.reshape(len(a), -1)
    own = jnp.einsum("...R,RS->...S", b, jnp.matmul(flat, flat.T, precision="highest"))
    added = jnp.sum(b * (2 * jnp.moveaxis(mixed, 0, -1) + own), axis=-1)
    return jnp.sqrt(jnp.maximum(squares + added, 0))


_norms = jax.jit(norms)
