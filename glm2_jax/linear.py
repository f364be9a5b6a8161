"""The product of activations and weights of every layer, and its gradient.

How it is computed: `glm2_jax.products`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from glm2_jax import forms
from glm2_jax.mesh import WEIGHT_RULES, active_mesh, constrain, pieces
from glm2_jax.products import Weight, add, describe, multiply, plain
from glm2_jax.quant import QTensor, dequantize_whole

_MATRICES = "MC,RC->MR"  # activations times a weight
_LEADING = "abcdef"  # in place of "...", over which a gradient cannot sum


def einsum(spec: str, x: jax.Array, w: Weight, added: jax.Array | None = None) -> jax.Array:
    """Compute `jnp.einsum` of activations and weights (or keys or values) in float32.

    Float32 operands are multiplied as float32 on every platform: GPUs would otherwise round them
    to TF32 and TPUs to bfloat16. The scales of quantized weights are applied in float32. Adding
    zeros as `added`, float32 of the result's shape, changes no bit, whatever the compiler fuses.
    """
    columns = _summed_columns(spec)
    if not columns:
        return _multiply(spec, None, x, w, added)
    if active_mesh():  # a matrix would merge axes that are cut over devices
        return _multiply(spec.replace("...", _LEADING[: x.ndim - columns]), None, x, w, added)
    rows = w.scale.shape if isinstance(w, QTensor) else w.shape
    rows = rows[: len(spec.split("->")[0].split(",")[1]) - columns]
    matrix = x.reshape(-1, math.prod(x.shape[x.ndim - columns :]))
    weight = _as_matrix(w, len(rows))
    added = None if added is None else added.reshape(len(matrix), -1)
    form = forms.chosen().of_product(describe(matrix, weight))
    product = _multiply(_MATRICES, form, matrix, weight, added)
    return product.reshape(*x.shape[: x.ndim - columns], *rows)


def project(spec: str, x: jax.Array, weight: Any, bias: jax.Array | None, added: Any) -> jax.Array:
    """Compute product, `added` and bias, rounded once: [B, T, D] -> [B, T, heads, H]."""
    projected = biased(einsum(spec, x, weight, added), bias).astype(x.dtype)
    return constrain(projected, *spec.split("->")[1])


def biased(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias.astype(jnp.float32)


def _product(
    spec: str, form: str | None, x: jax.Array, w: Weight, added: jax.Array | None
) -> jax.Array:
    """Compute the product, in a form of `products` if it is activations times a weight."""
    if spec != _MATRICES:
        return add(plain(spec, x, _as_array(spec, w, x.dtype)), added)
    return multiply(x, w, added, form)


def _forward(spec: str, form: str | None, x: jax.Array, w: Weight, added: jax.Array | None):
    adds = None if added is None else jnp.zeros(0)
    return _product(spec, form, x, w, added), (x, w, adds)


def _backward(spec: str, form: str | None, saved: tuple, gradient: jax.Array):
    """Compute gradients by plain products in the activations' dtype.

    Not every form can be differentiated, and a float32 gradient would make
    half-precision products slow. A quantized weight has no gradient; an unused gradient of a plain
    one is not computed.
    """
    x, w, adds = saved
    to_added = None if adds is None else gradient
    operands, result = spec.split("->")
    left, right = operands.split(",")
    gradient = gradient.astype(x.dtype)
    weight = _as_array(spec, w, x.dtype)
    to_w = None
    if not isinstance(w, QTensor):
        to_w = plain(f"{result},{left}->{right}", gradient, x).astype(w.dtype)
    to_x = plain(f"{result},{right}->{left}", gradient, weight).astype(x.dtype)
    return to_x, to_w, to_added


_multiply = jax.custom_vjp(_product, nondiff_argnums=(0, 1))
_multiply.defvjp(_forward, _backward)


def _summed_columns(spec: str) -> int:
    """Return how many trailing axes are summed if `spec` is activations times a weight, else 0."""
    operands, result = spec.split("->")
    left, right = operands.split(",")
    rows = "".join(axis for axis in right if axis in result)
    columns = right.removeprefix(rows)
    weight = right == rows + columns and left.endswith(columns) and not set(rows) & set(left)
    return len(columns) if weight and result == left.removesuffix(columns) + rows else 0


def _as_matrix(w: Weight, rows: int) -> Weight:
    """Reshape a weight with `rows` row axes to [R, C]."""
    if not isinstance(w, QTensor):
        return w.reshape(math.prod(w.shape[:rows]), -1)
    R, groups = math.prod(w.scale.shape[:rows]), w.scale.shape[rows:]
    return QTensor(w.values.reshape(R, -1), w.scale.reshape(R, *groups), w.bits)


def _as_array(spec: str, w: Weight, dtype: Any) -> jax.Array:
    """Return a weight with its own axes, dequantized."""
    if not isinstance(w, QTensor):
        return w
    letters = spec.split("->")[0].split(",")[1]
    cut = pieces(letters[-1], w.values.shape[-1], WEIGHT_RULES)
    return dequantize_whole(w, len(letters) - _summed_columns(spec), cut).astype(dtype)
