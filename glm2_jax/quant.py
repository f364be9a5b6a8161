"""Quantized weights: small integers, with a float scale for each row or each group of columns.

A weight is a matrix whose rows are its output axes and whose columns are the axes that a product
sums over; W = integers * scale.
"""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax.errors import CheckpointError
from glm2_jax.schemes import Scheme

Array = Any  # jax.Array or numpy.ndarray

# A smaller scale counts as 0, which the published quantizer gives to a row of zeros. Such a row is
# stored as zeros with the scale 1, so that nothing is divided by 0.
NO_SCALE = np.float32(1e-30)


@flax.struct.dataclass
class QTensor:
    """A quantized weight in the params tree, with layers stacked as for any parameter.

    With 4 bits a byte holds two columns, the even one in the high half, the odd one in the low
    half, both in two's complement (the packing of THUDM/chatglm2-6b-int4).
    """

    values: jax.Array  # int8 [*rows, *columns]; with 4 bits the last axis is half as long
    scale: jax.Array  # float [*rows], or [*rows, groups] for groups of consecutive columns
    bits: int = flax.struct.field(pytree_node=False)  # 8 or 4

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes of the weight."""
        return (*self.values.shape[:-1], self.values.shape[-1] * 8 // self.bits)

    @property
    def size(self) -> int:
        """The number of elements of the weight."""
        return self.values.size * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """The bytes of integers and scales."""
        return self.values.nbytes + self.scale.nbytes


def quantize(matrix: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Quantize float [rows, columns] to int8, 4 bits packed, and float32 scales, as in a QTensor.

    Symmetric rounding to nearest (even): scale = max|W| / 127, or / 7 for 4 bits. Source:
    quantization.py of THUDM/chatglm2-6b, but a row of zeros has the scale 1.
    """
    rows, columns = matrix.shape
    grouped = matrix.astype(np.float32).reshape(rows, -1, scheme.group(columns) or columns)
    largest = np.maximum(grouped.max(-1), -grouped.min(-1))
    scale = largest / np.float32(2 ** (scheme.bits - 1) - 1)
    none = scale < NO_SCALE
    scale[none], grouped[none] = 1, 0
    grouped /= scale[..., None]
    integers = np.rint(grouped, out=grouped).astype(np.int8).reshape(rows, columns)
    values = pack_int4(integers) if scheme.bits == 4 else integers
    return values, scale if scheme.grouped else scale[:, 0]


def quantize_vectors(x: jax.Array) -> QTensor:
    """Quantize float [*rows, columns] to int8 with a float32 scale for each row, max / 127.

    A row that is not finite has zeros, and the scale NaN or Inf: its dequantized values are NaN.
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(-1) / 127, NO_SCALE)
    integers = jnp.where(jnp.isfinite(scale)[..., None], jnp.rint(x / scale[..., None]), 0)
    return QTensor(integers.astype(jnp.int8), scale, 8)


def dequantize(weight: QTensor, rows: int) -> jax.Array:
    """Return the float32 weight [*rows, columns], its columns as one axis after `rows` axes."""
    return dequantize_whole(weight, rows, 1).reshape(*weight.scale.shape[:rows], -1)


def dequantize_whole(weight: QTensor, rows: int, cut: int) -> jax.Array:
    """Return the float32 weight [*rows, *columns]; its last axis is cut into `cut` pieces.

    Nothing moves between devices: where a group of columns is on two of them, its scale is repeated
    for smaller groups.
    """
    integers = weight.values
    if weight.bits == 4:
        pairs = jnp.stack(int4_halves(integers), axis=-1)
        integers = pairs.reshape(*integers.shape[:-1], -1)
    scale = weight.scale.astype(jnp.float32)
    shape, columns = integers.shape, integers.shape[rows:]
    if scale.ndim == rows:
        return integers.astype(jnp.float32) * jnp.expand_dims(scale, range(rows, len(shape)))
    group = math.prod(columns) // scale.shape[-1]
    small = math.gcd(group, columns[-1] // cut)
    scale = jnp.repeat(scale, group // small, axis=-1) if small < group else scale
    scale = scale.reshape(*shape[:-1], columns[-1] // small)
    grouped = integers.astype(jnp.float32).reshape(*scale.shape, small)
    return (grouped * scale[..., None]).reshape(shape)


def int4_halves(packed: Array) -> tuple[Array, Array]:
    """Split int8 [..., columns / 2] into the even and the odd columns, each int8 of that shape."""
    return packed >> 4, (packed << 4) >> 4


def pack_int4(integers: np.ndarray) -> np.ndarray:
    """Pack int8 [..., columns] in -8..7 into int8 [..., columns / 2]; an odd number is an error."""
    if integers.shape[-1] % 2:
        raise CheckpointError(
            f"A weight of {integers.shape[-1]} columns cannot be stored in int4.",
            "Two columns share a byte.",
            "Use int8.",
        )
    return (integers[..., 0::2] << 4) | (integers[..., 1::2] & 15)


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """Unpack int8 [..., columns / 2] into int8 [..., columns], the inverse of `pack_int4`."""
    return np.stack(int4_halves(packed), axis=-1).reshape(*packed.shape[:-1], -1)
