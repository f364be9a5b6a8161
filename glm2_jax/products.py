"""The forms in which a product of activations and a weight can be computed.

Each form computes [M, C] times [R, C], plain or quantized: float32 [M, R]. All are right; which is
fast depends on the platform, the machine and the shapes. Without a measured choice each platform
has its usual one. Why they differ, with measurements: docs/reference/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm2_jax.forms import Product
from glm2_jax.limits import CHUNK_ELEMENTS, FEW_ROWS, LANES, SLICES
from glm2_jax.quant import QTensor, dequantize, int4_halves

Weight = jax.Array | QTensor

_MATRICES = "MC,RC->MR"
_SMALL = 2**16  # elements of a chunk that stays in the first caches of a core


def describe(x: jax.Array, w: Weight) -> Product:
    """Return what identifies a product of [M, C] and [R, C]."""
    shape = (w.values.shape[0], x.shape[1]) if isinstance(w, QTensor) else w.shape
    return Product(x.shape[0], (shape[0], shape[1]), kind_of(w), x.dtype.name)


def kind_of(w: Weight) -> str:
    """Return "bfloat16", "int8", "int4 by 128", ...: what a weight is stored as."""
    if not isinstance(w, QTensor):
        return w.dtype.name
    groups = "" if w.scale.ndim == 1 else f" by {w.size // w.scale.size}"
    return f"int{w.bits}{groups}"


def multiply(x: jax.Array, w: Weight, added: jax.Array | None, form: str | None) -> jax.Array:
    """Compute the product and add `added`, in a form of `PRODUCTS`; None = the platform's."""
    if form is not None and len(x) <= (PRODUCTS[form].most or len(x)):
        return PRODUCTS[form].compute(x, w, added)
    usual = {
        "cpu": partial(in_usual_form, "cpu"),
        "cuda": partial(in_usual_form, "gpu"),
        "tpu": partial(in_usual_form, "tpu"),
    }
    return jax.lax.platform_dependent(x, w, added, **usual, default=_by_dot)


def plain(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Compute an einsum in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, w, precision=precision, preferred_element_type=jnp.float32)


def _by_dot(x: jax.Array, w: Weight, added: jax.Array | None = None) -> jax.Array:
    """Multiply [M, C] by [R, C], float32 [M, R]; what is quantized is dequantized first, but for
    integers with a scale for each row: XLA:GPU fuses converting them into the product, but not
    scaling them, and would write a complete copy of the weight."""
    if isinstance(w, QTensor) and w.bits == 8 and w.scale.ndim == 1:
        scale = w.scale.astype(jnp.float32)
        return add(plain(_MATRICES, x, w.values.astype(x.dtype)), added, scale) * scale
    w = dequantize(w, 1).astype(x.dtype) if isinstance(w, QTensor) else w
    return add(plain(_MATRICES, x, w), added)


def add(product: jax.Array, added: jax.Array | None, scale: Any = 1) -> jax.Array:
    """Add `added` to a product that is yet to be multiplied by `scale`.

    Compilers fuse that multiplication with a later addition, which rounds once. Adding after the
    multiplication would round twice, even if zero is added.
    """
    return product if added is None else product + added / scale


def _by_sums(x: jax.Array, w: Weight, added: jax.Array | None = None) -> jax.Array:
    """Multiply and sum up: XLA:GPU fuses slicing the weight out of stacked ones, unpacking and
    converting into a reduction; for a dot it writes a copy of a layer's weight."""
    parts = _parts(x.astype(jnp.float32), w)
    first, *others = (half[:, None] * part.astype(jnp.float32) for half, part in parts)
    products = sum(others, first)
    if not isinstance(w, QTensor):
        return add(products.sum(-1), added)
    scale = w.scale.astype(jnp.float32)
    if scale.ndim == 1:
        return add(products.sum(-1), added, scale) * scale
    products = products.reshape(*products.shape[:2], scale.shape[1], -1).sum(-1)
    return add((products * scale).sum(-1), added)


def _parts(x: jax.Array, w: Weight) -> list[tuple[jax.Array, jax.Array]]:
    """Pair activations with integers; of 4 bits, those of the even and those of the odd columns."""
    if not isinstance(w, QTensor):
        return [(x, w)]
    if w.bits == 8:
        return [(x, w.values)]
    return list(zip((x[:, 0::2], x[:, 1::2]), int4_halves(w.values), strict=True))


def _by_slices(x: jax.Array, w: QTensor, added: jax.Array | None = None) -> jax.Array:
    """Add up products of slices of the columns of integers, for a few rows.

    XLA:CPU compiles that to one loop over the stored bytes, vectorized and on all cores; it does
    neither for a sum along the columns.
    """
    rows = [_row_by_slices(row, w) for row in x.astype(jnp.float32)]
    if w.scale.ndim == 2:
        return add(jnp.stack(rows), added)
    scale = w.scale.astype(jnp.float32)
    return add(jnp.stack(rows), added, scale) * scale


def _row_by_slices(x: jax.Array, w: QTensor) -> jax.Array:
    """Do so for one row, float32 [C]: float32 [R], of which one scale for each row is left out."""
    width, group = w.values.shape[1], _group_bytes(w)
    lanes = min(group, max(LANES, 2 ** (-(-width // SLICES) - 1).bit_length()))
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
        return total @ jnp.ones(lanes, jnp.float32)
    total, each = jnp.float32(0), group // lanes
    for number in range(slices // each):
        indices = range(number * each, (number + 1) * each)
        scale = w.scale[:, number, None].astype(jnp.float32)
        total += scale * sum((product(index) for index in indices), jnp.float32(0))
        if (number + 1) * each % SLICES == 0:
            total = jax.lax.optimization_barrier(total)  # else the loop is not vectorized
    return total @ jnp.ones(lanes, jnp.float32)


def _in_chunks(
    x: jax.Array,
    w: Weight,
    added: jax.Array | None = None,
    *,
    wide: bool = False,
    elements: int | None = None,
) -> jax.Array:
    """Convert or unpack a few rows of the weight at once, and multiply them by a dot: so that they
    stay in a cache, where a CPU would write a complete copy of the weight to memory.

    Products are in bfloat16 for activations in bfloat16, unless `wide` is set or columns are scaled
    in groups: integers are exact in bfloat16, scaled ones are not.
    """
    grouped = isinstance(w, QTensor) and w.scale.ndim == 2
    narrow = x.dtype == jnp.bfloat16 and not grouped and not wide
    x = x.astype(jnp.bfloat16 if narrow else jnp.float32)
    if narrow and x.shape[0] == 1:
        return _as_two_rows(partial(_in_chunks, elements=elements), x, w, added)
    if not isinstance(w, QTensor):
        total = _by_chunks(lambda c: _by_dot(x, c.astype(x.dtype)), x, elements, w.size, w)
        return add(total, added)
    total = _unpacked_by_chunks(x, w, elements, scaled=grouped)
    if grouped:
        return add(total, added)
    scale = w.scale.astype(jnp.float32)
    return add(total, added, scale) * scale


def _as_two_rows(
    form: Callable[..., jax.Array], x: jax.Array, w: Weight, added: jax.Array | None = None
) -> jax.Array:
    """Multiply one row as the first of two: from two on XLA:CPU has a fast product in bfloat16."""
    return form(jnp.concatenate([x, jnp.zeros_like(x)]), w, added)[:1]


def _group_bytes(w: QTensor) -> int:
    """Return how many bytes of integers share a scale."""
    return w.values.shape[1] // (w.scale.shape[1] if w.scale.ndim == 2 else 1)


def _unpacked_by_chunks(
    x: jax.Array, w: QTensor, elements: int | None = None, *, scaled: bool
) -> jax.Array:
    """Multiply [M, C] by the integers of [R, C], `scaled` first or not at all: float32 [M, R]."""

    def product(values: jax.Array, scale: jax.Array) -> jax.Array:
        total = jnp.float32(0)
        for half, part in _parts(x, QTensor(values, scale, w.bits)):
            part = dequantize(QTensor(part, scale, bits=8), 1) if scaled else part
            total += _by_dot(half, part.astype(x.dtype))
        return total

    return _by_chunks(product, x, elements, w.size, w.values, w.scale)


def _by_chunks(
    product: Callable[..., jax.Array], x: jax.Array, most: int | None, size: int, *arrays: jax.Array
) -> jax.Array:
    """Apply `product` ([r, ...] arrays -> [M, r]) to chunks of R rows: float32 [M, R].

    `x` are the [M, C] activations that `product` uses, `size` is that of the weight, and `most`
    the elements of a chunk; None = `CHUNK_ELEMENTS`.
    """
    rows = arrays[0].shape[0]
    count = -(-size // (most or CHUNK_ELEMENTS))
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


def _in_scaled_chunks(x: jax.Array, w: QTensor, added: jax.Array | None = None) -> jax.Array:
    """Unpack and scale a few rows of the weight at once, and multiply them by a dot in the
    activations' dtype."""
    return add(_unpacked_by_chunks(x, w, scaled=True), added)


def usual_form(platform: str, x: jax.Array, w: Weight) -> str:
    """Return the form that is usual on a platform, "cpu", "gpu" or "tpu"."""
    quantized = isinstance(w, QTensor)
    if platform == "gpu":  # XLA fuses slicing, unpacking and converting into sums
        return "sums" if len(x) <= FEW_ROWS else "dot"
    if platform == "tpu":  # XLA fuses unpacking 8 bits into a product, but not 4
        return "scaled chunks" if quantized and w.bits == 4 else "dot"
    # XLA:CPU has fast products for float32 and, from two rows on, bfloat16.
    if len(x) == 1 and _slices_fit(w):
        return "slices"
    if not _same(w, x) or x.dtype == jnp.float16:
        return "chunks"
    return "dot of two rows" if x.dtype == jnp.bfloat16 and len(x) == 1 else "dot"


def in_usual_form(
    platform: str, x: jax.Array, w: Weight, added: jax.Array | None = None
) -> jax.Array:
    """Compute a product as `usual_form` says."""
    return PRODUCTS[usual_form(platform, x, w)].compute(x, w, added)


def _slices_fit(w: Weight) -> bool:
    return isinstance(w, QTensor) and _group_bytes(w) % LANES == 0


class Form(NamedTuple):
    """One way to compute a product."""

    compute: Callable[[jax.Array, Any, jax.Array | None], jax.Array]
    # Whether it is worth measuring there: (platform, activations, weight).
    suits: Callable[[str, jax.Array, Weight], bool]
    most: int | None = None  # rows that it takes; None = any number


def _same(w: Weight, x: jax.Array) -> bool:
    return not isinstance(w, QTensor) and w.dtype == x.dtype


PRODUCTS: dict[str, Form] = {
    # A CPU or TPU would write a complete copy of unpacked or converted weights to memory.
    "dot": Form(_by_dot, lambda on, x, w: on == "gpu" or _same(w, x)),
    "dot of two rows": Form(
        partial(_as_two_rows, _by_dot), lambda on, x, w: on == "cpu" and _same(w, x), most=1
    ),
    "sums": Form(_by_sums, lambda on, x, w: on == "gpu", most=16),
    "slices": Form(_by_slices, lambda on, x, w: on == "cpu" and _slices_fit(w), most=4),
    "chunks": Form(_in_chunks, lambda on, x, w: on == "cpu"),
    "scaled chunks": Form(
        _in_scaled_chunks, lambda on, x, w: on == "tpu" and isinstance(w, QTensor)
    ),
    "small chunks": Form(partial(_in_chunks, elements=_SMALL), lambda on, x, w: on == "cpu"),
    "wide chunks": Form(
        partial(_in_chunks, wide=True), lambda on, x, w: on == "cpu" and x.dtype == jnp.bfloat16
    ),
    "small wide chunks": Form(
        partial(_in_chunks, wide=True, elements=_SMALL),
        lambda on, x, w: on == "cpu" and x.dtype == jnp.bfloat16,
    ),
}


def candidates(platform: str, x: jax.Array, w: Weight) -> list[str]:
    """Return the forms worth measuring for a product on a platform, "cpu", "gpu" or "tpu"."""
    return [
        name
        for name, form in PRODUCTS.items()
        if form.suits(platform, x, w) and len(x) <= (form.most or len(x))
    ]
