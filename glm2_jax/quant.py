"""Quantized weights: small integers, with a float scale for each row or each group of columns.

A weight is read as a matrix whose rows are its output axes and whose columns are the axes that a
product sums over. Only the integers change with the width; W = integers * scale.
"""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax.errors import CheckpointError
from glm2_jax.schemes import COLUMN_AXES as COLUMN_AXES
from glm2_jax.schemes import EMBEDDINGS as EMBEDDINGS
from glm2_jax.schemes import GROUP as GROUP
from glm2_jax.schemes import SCHEMES as SCHEMES
from glm2_jax.schemes import Scheme as Scheme

Array = Any  # jax.Array or numpy.ndarray

# Below this a scale counts as 0, as the published quantizer gives it to a row of zeros. Such a row
# is stored as zeros of the scale 1, so that nothing divides by a scale that is none.
NO_SCALE = np.float32(1e-30)


@flax.struct.dataclass
class QTensor:
    """A quantized weight, as data in the params tree. Layers are stacked as for any parameter.

    Attributes:
        values: int8. With 8 bits [*rows, *columns]; with 4 bits the last axis is half as long and
            a byte holds two columns, the even one in its high half, the odd one in its low half,
            both in two's complement (the packing of THUDM/chatglm2-6b-int4).
        scale: float [*rows], or [*rows, groups] where consecutive columns form groups of one size.
        bits: 8 or 4.
    """

    values: jax.Array
    scale: jax.Array
    bits: int = flax.struct.field(pytree_node=False)

    @property
    def size(self) -> int:
        """Elements of the weight."""
        return self.values.size * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of the integers and the scales."""
        return self.values.nbytes + self.scale.nbytes


def quantize(matrix: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric rounding to nearest (even): scale = max|W| / 127 for 8 bits, / 7 for 4 bits.

    Source: quantization.py of THUDM/chatglm2-6b, whose division by zero for a row of zeros is not
    kept: such a row has the scale 1.

    Args:
        matrix: float [rows, columns].
        scheme: how.

    Returns:
        (int8 [rows, columns], or [rows, columns / 2] packed; float32 scales [rows] or
        [rows, groups]).

    Raises:
        CheckpointError: an odd number of columns for 4 bits.
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


def dequantize(weight: QTensor, rows: int) -> jax.Array:
    """The float32 weight [*rows, columns], its columns as one axis.

    Args:
        rows: number of its row axes, stacked layers included.
    """
    return dequantize_whole(weight, rows, 1).reshape(*weight.scale.shape[:rows], -1)


def dequantize_whole(weight: QTensor, rows: int, cut: int) -> jax.Array:
    """The float32 weight [*rows, *columns].

    Where it lies on several devices, every element is made where it lies. A group of columns may
    lie on two of them: its scale is repeated, for smaller groups that do not.

    Args:
        rows: number of its row axes.
        cut: how many devices the last axis lies on.
    """
    integers = unpacked(weight)
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


def take_rows(weight: QTensor, index: jax.Array) -> jax.Array:
    """The rows of a matrix [rows, columns], unpacked alone: float32 [*index, columns]."""
    taken = QTensor(weight.values[index], weight.scale[index], weight.bits)
    return dequantize(taken, index.ndim)


def unpacked(weight: QTensor) -> jax.Array:
    """The integers, int8 [*rows, *columns]."""
    if weight.bits == 8:
        return weight.values
    pairs = jnp.stack(int4_halves(weight.values), axis=-1)
    return pairs.reshape(*weight.values.shape[:-1], -1)


def int4_halves(packed: Array) -> tuple[Array, Array]:
    """int8 [..., columns / 2] -> the even and the odd columns, each int8 [..., columns / 2]."""
    return packed >> 4, (packed << 4) >> 4


def pack_int4(integers: np.ndarray) -> np.ndarray:
    """int8 [..., columns] in -8..7 -> int8 [..., columns / 2]; the inverse of `unpack_int4`.

    Raises:
        CheckpointError: an odd number of columns.
    """
    if integers.shape[-1] % 2:
        raise CheckpointError(
            f"A weight of {integers.shape[-1]} columns cannot be stored in int4.",
            "Two columns share a byte.",
            "Use int8.",
        )
    return (integers[..., 0::2] << 4) | (integers[..., 1::2] & 15)


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """int8 [..., columns / 2] -> int8 [..., columns]."""
    result = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.int8)
    result[..., 0::2], result[..., 1::2] = int4_halves(packed)
    return result
