"""The product of activations and weights of every layer, and its gradient.

How it is computed: `glm2_jax.products`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from glm2_jax.forms import Forms, chosen
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
    if active_mesh():
        spec = spec.replace("...", _LEADING[: x.ndim - _summed_columns(spec)])
    return _multiply(spec, chosen(), x, w, added)


def project(
    spec: str, x: jax.Array, weight: Any, bias: jax.Array | None, added: Any, gain: Any = None
) -> jax.Array:
    """Compute product, `added` and bias, rounded once: [B, T, D] -> [B, T, heads, H]; the sum of
    the first two is multiplied by `gain`."""
    projected = biased(scaled(einsum(spec, x, weight, added), gain), bias).astype(x.dtype)
    return constrain(projected, *spec.split("->")[1])


def scaled(x: jax.Array, gain: jax.Array | None) -> jax.Array:
    return x if gain is None else x * gain


def biased(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias.astype(jnp.float32)


def _product(
    spec: str, forms: Forms, x: jax.Array, w: Weight, added: jax.Array | None
) -> jax.Array:
    """Compute the product, in a form of `products` if it is activations times a weight."""
    columns = _merged_columns(spec)
    if not columns:
        return add(plain(spec, x, _as_array(spec, w, x.dtype)), added)
    rows = w.scale.shape if isinstance(w, QTensor) else w.shape
    rows = rows[: _row_axes(spec)]
    matrix = x.reshape(-1, math.prod(x.shape[x.ndim - columns :]))
    weight = _as_matrix(w, len(rows))
    added = None if added is None else added.reshape(len(matrix), -1)
    product = multiply(matrix, weight, added, forms.of_product(describe(matrix, weight)))
    return product.reshape(*x.shape[: x.ndim - columns], *rows)


def _forward(spec: str, forms: Forms, x: Any, w: Any, added: Any) -> tuple[jax.Array, Any]:
    """Return the product, and what the gradients need: activations only for a trained weight."""
    trained = any(one.perturbed for one in jax.tree.leaves(w))
    x, w, added = jax.tree.map(lambda one: one.value, (x, w, added))
    like = jnp.zeros((0, *x.shape), x.dtype)  # its shape and dtype, no bytes
    adds = None if added is None else jnp.zeros(0)
    return _product(spec, forms, x, w, added), (x if trained else None, like, w, adds)


def _backward(
    spec: str, forms: Forms, saved: tuple[Any, ...], gradient: jax.Array
) -> tuple[Any, ...]:
    """Compute gradients by plain products in the activations' dtype.

    Not every form can be differentiated, and a float32 gradient would make
    half-precision products slow. A frozen weight has no gradient.
    """
    x, like, w, adds = saved
    to_added = None if adds is None else gradient
    shape, dtype = like.shape[1:], like.dtype
    gradient, stored = gradient.astype(dtype), w
    if columns := _merged_columns(spec):
        gradient = gradient.reshape(math.prod(shape[: len(shape) - columns]), -1)
        x = None if x is None else x.reshape(len(gradient), -1)
        w, spec = _as_matrix(w, _row_axes(spec)), _MATRICES
    operands, result = spec.split("->")
    left, right = operands.split(",")
    weight = _as_array(spec, w, dtype)
    to_x = plain(f"{result},{right}->{left}", gradient, weight).astype(dtype).reshape(shape)
    to_w = None
    if x is not None and not isinstance(stored, QTensor):
        to_w = plain(f"{result},{left}->{right}", gradient, x).astype(stored.dtype)
        to_w = to_w.reshape(stored.shape)
    return to_x, to_w, to_added


_multiply = jax.custom_vjp(_product, nondiff_argnums=(0, 1))
_multiply.defvjp(_forward, _backward, symbolic_zeros=True)


def _summed_columns(spec: str) -> int:
    """Return how many trailing axes are summed if `spec` is activations times a weight, else 0."""
    operands, result = spec.split("->")
    left, right = operands.split(",")
    rows = "".join(axis for axis in right if axis in result)
    columns = right.removeprefix(rows)
    weight = right == rows + columns and left.endswith(columns) and not set(rows) & set(left)
    return len(columns) if weight and result == left.removesuffix(columns) + rows else 0


def _merged_columns(spec: str) -> int:
    """Return the same if the product is one of matrices here, else 0."""
    # A matrix would merge axes that are cut over devices.
    return 0 if active_mesh() else _summed_columns(spec)


def _row_axes(spec: str) -> int:
    """Return how many axes of a weight are not summed."""
    return len(spec.split("->")[0].split(",")[1]) - _summed_columns(spec)


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
    last = spec.split("->")[0].split(",")[1][-1]
    cut = pieces(last, w.values.shape[-1], WEIGHT_RULES)
    return dequantize_whole(w, _row_axes(spec), cut).astype(dtype)
