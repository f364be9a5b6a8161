"""The numbers of a stored tensor, a few megabytes at a time, checked on the way.

Whole tensors are never copied: what is read is a view of the mapped file, what is computed
(dequantised, cast) has the size of a chunk.
"""

from collections.abc import Iterator

import numpy as np

from convert.names import Match
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError

CHUNK_ELEMENTS = 4 * 2**20

# The exponent bits of a two-byte float: all ones means infinity or NaN. Comparing bits is several
# times faster than numpy's isfinite on these types.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


class Values:
    """The elements of a matched tensor, in the published order.

    Args:
        match: the tensor.
        config: gives its shape.
        bits: 4 or 8 when it is stored quantised.
    """

    def __init__(self, match: Match, config: GLMConfig, bits: int = 0):
        self.match, self.bits = match, bits
        self.columns = match.rule.shape(config)[-1]
        array = match.tensor.read()
        if match.scale is None:
            self.flat = array.reshape(-1)
        else:
            self.matrix = array
            self.scales = match.scale.read().astype(np.float32)

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first element, values [n]) over a range of whole rows; finite, as stored or float32.

        Raises:
            CheckpointError: NaN or infinity, named.
        """
        step = max(CHUNK_ELEMENTS // self.columns, 1) * self.columns
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            chunk = self._values(begin, end)
            if not all_finite(chunk):
                raise _not_finite(self.match, chunk, begin)
            yield begin, chunk

    def _values(self, begin: int, end: int) -> np.ndarray:
        if self.match.scale is None:
            return self.flat[begin:end]
        rows = slice(begin // self.columns, end // self.columns)
        packed = self.matrix[rows]
        whole = unpack_int4(packed) if self.bits == 4 else packed
        return (whole.astype(np.float32) * self.scales[rows, None]).reshape(-1)


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """int8 [rows, columns / 2] -> int8 [rows, columns]: even columns lie in the high half of a
    byte, odd ones in the low half, both in two's complement (THUDM/chatglm2-6b-int4)."""
    result = np.empty((packed.shape[0], packed.shape[1] * 2), np.int8)
    np.right_shift(packed, 4, out=result[:, 0::2])
    np.right_shift(np.left_shift(packed, 4), 4, out=result[:, 1::2])
    return result


def all_finite(values: np.ndarray) -> bool:
    """Whether there is neither NaN nor infinity in [n] floats."""
    mask = _EXPONENTS.get(values.dtype.name)
    if mask is None:
        return bool(np.isfinite(values).all())
    return not bool(((values.view(np.uint16) & mask) == mask).any())


def cast(chunk: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The chunk of the tensor `name` in another type.

    Raises:
        CheckpointError: a number is too large for float16.
    """
    if chunk.dtype == dtype:
        return chunk
    with np.errstate(over="ignore"):
        result = chunk.astype(dtype)
    if dtype == np.float16 and not all_finite(result):
        largest = float(np.abs(chunk.astype(np.float32)).max())
        raise CheckpointError(
            f"{name} holds {largest:g}, which float16 cannot represent.",
            "The largest float16 is 65504; larger numbers would become infinite.",
            "Use --dtype bfloat16 or --dtype float32.",
        )
    return result


def _not_finite(match: Match, chunk: np.ndarray, begin: int) -> CheckpointError:
    values = chunk.astype(np.float32)
    where = int(np.flatnonzero(~np.isfinite(values))[0])
    layer = "" if match.layer is None else f" (layer {match.layer})"
    return CheckpointError(
        f"{match.name}{layer} holds {values[where]} at element {begin + where}.",
        f"{match.tensor.file} is damaged, or the training that made it went wrong.",
        "Download the file again and compare its sha256 with the published one.",
    )
