"""The product of activations and weights of every layer, in the fastest form of each platform.

Why the forms differ, with measurements: docs/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glm2_jax.limits import CHUNK_ELEMENTS, FEW_ROWS, LANES, SLICES
from glm2_jax.mesh import WEIGHT_RULES, active_mesh, pieces
from glm2_jax.quant import QTensor, dequantize, dequantize_whole, int4_halves

Weight = jax.Array | QTensor

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
    return _multiply(spec, x, w, added)


def _product(spec: str, x: jax.Array, w: Weight, added: jax.Array | None) -> jax.Array:
    """Compute the product, in the platform's form if it is activations times a weight."""
    columns = _merged_columns(spec)
    if not columns:
        return _add(_plain(spec, x, _as_array(spec, w, x.dtype)), added)
    rows = w.scale.shape if isinstance(w, QTensor) else w.shape
    rows = rows[: _row_axes(spec)]
    matrix = x.reshape(-1, math.prod(x.shape[x.ndim - columns :]))
    weight = _as_matrix(w, len(rows))
    added = None if added is None else added.reshape(len(matrix), -1)
    # Each computes [M, C] times a weight [R, C]: float32 [M, R].
    forms = {"cpu": _on_cpu, "cuda": _on_gpu, "tpu": _on_tpu}
    product = jax.lax.platform_dependent(matrix, weight, added, **forms, default=_by_dot)
    return product.reshape(*x.shape[: x.ndim - columns], *rows)


def _forward(spec: str, x: Any, w: Any, added: Any) -> tuple[jax.Array, Any]:
    """Return the product, and what the gradients need: activations only for a trained weight."""
    trained = any(one.perturbed for one in jax.tree.leaves(w))
    x, w, added = jax.tree.map(lambda one: one.value, (x, w, added))
    form = jnp.zeros((0, *x.shape), x.dtype)
    adds = None if added is None else jnp.zeros(0)
    return _product(spec, x, w, added), (x if trained else None, form, w, adds)


def _backward(spec: str, saved: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
    """Compute gradients by plain products in the activations' dtype.

    Not every platform's form can be differentiated, and a float32 gradient would make
    half-precision products slow. A frozen weight has no gradient.
    """
    x, form, w, adds = saved
    to_added = None if adds is None else gradient
    shape, dtype = form.shape[1:], form.dtype
    gradient, stored = gradient.astype(dtype), w
    if columns := _merged_columns(spec):
        gradient = gradient.reshape(math.prod(shape[: len(shape) - columns]), -1)
        x = None if x is None else x.reshape(len(gradient), -1)
        w, spec = _as_matrix(w, _row_axes(spec)), _MATRICES
    operands, result = spec.split("->")
    left, right = operands.split(",")
    weight = _as_array(spec, w, dtype)
    to_x = _plain(f"{result},{right}->{left}", gradient, weight).astype(dtype).reshape(shape)
    to_w = None
    if x is not None and not isinstance(stored, QTensor):
        to_w = _plain(f"{result},{left}->{right}", gradient, x).astype(stored.dtype)
        to_w = to_w.reshape(stored.shape)
    return to_x, to_w, to_added


_multiply = jax.custom_vjp(_product, nondiff_argnums=(0,))
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


def _plain(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, w, precision=precision, preferred_element_type=jnp.float32)


def _by_dot(x: jax.Array, w: Weight, added: jax.Array | None = None) -> jax.Array:
    """Multiply [M, C] by [R, C], dequantized first: float32 [M, R]."""
    w = dequantize(w, 1).astype(x.dtype) if isinstance(w, QTensor) else w
    return _add(_plain(_MATRICES, x, w), added)


def _add(product: jax.Array, added: jax.Array | None, scale: Any = 1) -> jax.Array:
    """Add `added` to a product that is yet to be multiplied by `scale`.

    Compilers fuse that multiplication with a later addition, which rounds once. Adding after the
    multiplication would round twice, even if zero is added.
    """
    return product if added is None else product + added / scale


def _on_gpu(x: jax.Array, w: Weight, added: jax.Array | None = None) -> jax.Array:
    """Do the same for XLA:GPU, which writes a copy of a layer's weight for a dot.

    Into a reduction it fuses slicing the weight out of stacked ones, unpacking and converting.
    """
    if x.shape[0] > FEW_ROWS:
        return _by_dot(x, w, added)
    parts = _parts(x.astype(jnp.float32), w)
    first, *others = (half[:, None] * part.astype(jnp.float32) for half, part in parts)
    products = sum(others, first)
    if not isinstance(w, QTensor):
        return _add(products.sum(-1), added)
    scale = w.scale.astype(jnp.float32)
    if scale.ndim == 1:
        return _add(products.sum(-1), added, scale) * scale
    products = products.reshape(*products.shape[:2], scale.shape[1], -1).sum(-1)
    return _add((products * scale).sum(-1), added)


def _on_tpu(x: jax.Array, w: Weight, added: jax.Array | None = None) -> jax.Array:
    """Do the same for XLA:TPU, which fuses unpacking 8 bits into a product, but not 4 bits.

    It writes unpacked 4-bit weights to memory first, so they are unpacked in chunks.
    """
    if not isinstance(w, QTensor) or w.bits == 8:
        return _by_dot(x, w, added)
    return _add(_unpacked_by_chunks(x, w, scaled=True), added)


def _parts(x: jax.Array, w: Weight) -> list[tuple[jax.Array, jax.Array]]:
    """Pair activations with integers; of 4 bits, those of the even and those of the odd columns."""
    if not isinstance(w, QTensor):
        return [(x, w)]
    if w.bits == 8:
        return [(x, w.values)]
    return list(zip((x[:, 0::2], x[:, 1::2]), int4_halves(w.values), strict=True))


def _on_cpu(x: jax.Array, w: Weight, added: jax.Array | None = None) -> jax.Array:
    """Do the same for XLA:CPU, which has fast products for float32 and, from two rows, bfloat16.

    For everything else it would first write a float32 copy of the complete weight to memory.
    """
    if x.shape[0] == 1 and isinstance(w, QTensor) and _group_bytes(w) % LANES == 0:
        return _one_row_on_cpu(x, w, added)
    grouped = isinstance(w, QTensor) and w.scale.ndim == 2
    # Integers are exact in bfloat16, scaled ones are not.
    dtype = jnp.bfloat16 if x.dtype == jnp.bfloat16 and not grouped else jnp.float32
    x = x.astype(dtype)
    if dtype == jnp.bfloat16 and x.shape[0] == 1:
        return _on_cpu(jnp.concatenate([x, jnp.zeros_like(x)]), w, added)[:1]
    if not isinstance(w, QTensor):
        if w.dtype == dtype:
            return _by_dot(x, w, added)
        total = _by_chunks(lambda chunk: _by_dot(x, chunk.astype(dtype)), x, w.size, w)
        return _add(total, added)

    total = _unpacked_by_chunks(x, w, scaled=grouped)
    if grouped:
        return _add(total, added)
    scale = w.scale.astype(jnp.float32)
    return _add(total, added, scale) * scale


def _one_row_on_cpu(x: jax.Array, w: QTensor, added: jax.Array | None) -> jax.Array:
    """Do the same for one row and integers, adding up products of slices of the columns.

    XLA:CPU compiles that to one loop over the stored bytes, vectorized and on all cores; it does
    neither for a sum along the columns.
    """
    width, group = w.values.shape[1], _group_bytes(w)
    lanes = min(group, max(LANES, 2 ** (-(-width // SLICES) - 1).bit_length()))
    x = x[0].astype(jnp.float32)
    halves = jnp.stack([x] if w.bits == 8 else [x[0::2], x[1::2]])
    rest = width % lanes  # the last slice overlaps the one before, and is multiplied by zeros there
    zeros = jnp.zeros((len(halves), -rest % lanes), jnp.float32)
    halves = jnp.concatenate([halves[:, : width - rest], zeros, halves[:, width - rest :]], axis=1)
    # Nothing is computed on activations inside the loop.
    halves = jax.lax.optimization_barrier(halves.reshape(len(halves), -1, lanes))

    def product(index: int) -> jax.Array:
        start = min(index * lanes, width - lanes)
        values = w.values[:, start : start + lanes]
        parts = (values,) if w.bits == 8 else int4_halves(values)
        total = jnp.float32(0)
        for half, part in zip(halves[:, index], parts, strict=True):
            total += half * part.astype(jnp.float32)
        return total

    slices = halves.shape[1]
    if w.scale.ndim == 1:
        total = sum((product(index) for index in range(slices)), jnp.float32(0))
        scale = w.scale.astype(jnp.float32)
        return _add((total @ jnp.ones(lanes, jnp.float32))[None], added, scale) * scale
    total, each = jnp.float32(0), group // lanes
    for number in range(slices // each):
        indices = range(number * each, (number + 1) * each)
        scale = w.scale[:, number, None].astype(jnp.float32)
        total += scale * sum((product(index) for index in indices), jnp.float32(0))
        if (number + 1) * each % SLICES == 0:
            total = jax.lax.optimization_barrier(total)  # else the loop is not vectorized
    return _add((total @ jnp.ones(lanes, jnp.float32))[None], added)


def _group_bytes(w: QTensor) -> int:
    """Return how many bytes of integers share a scale."""
    return w.values.shape[1] // (w.scale.shape[1] if w.scale.ndim == 2 else 1)


def _unpacked_by_chunks(x: jax.Array, w: QTensor, *, scaled: bool) -> jax.Array:
    """Multiply [M, C] by the integers of [R, C], `scaled` first or not at all: float32 [M, R]."""

    def product(values: jax.Array, scale: jax.Array) -> jax.Array:
        total = jnp.float32(0)
        for half, part in _parts(x, QTensor(values, scale, w.bits)):
            part = dequantize(QTensor(part, scale, bits=8), 1) if scaled else part
            total += _by_dot(half, part.astype(x.dtype))
        return total

    return _by_chunks(product, x, w.size, w.values, w.scale)


def _by_chunks(
    product: Callable[..., jax.Array], x: jax.Array, elements: int, *arrays: jax.Array
) -> jax.Array:
    """Apply `product` ([r, ...] arrays -> [M, r]) to chunks of R rows: float32 [M, R].

    `x` are the [M, C] activations that `product` uses, `elements` is the size of the weight.
    """
    rows = arrays[0].shape[0]
    count = -(-elements // CHUNK_ELEMENTS)
    while rows % count:
        count += 1
    if count == 1:
        return product(*arrays)
    size = rows // count

    def write(index, out):
        chunk = (jax.lax.dynamic_slice_in_dim(array, index * size, size) for array in arrays)
        return jax.lax.dynamic_update_slice_in_dim(out, product(*chunk), index * size, axis=1)

    # It depends on `x`: a constant would be allocated at the start of the program, for the products
    # of all layers at once, 9 GB for 2048 tokens of a 6B model.
    out = jnp.full((x.shape[0], rows), 0 * x[0, 0], jnp.float32)
    return jax.lax.fori_loop(0, count, write, out)
