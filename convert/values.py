"""The numbers of a stored tensor, a few megabytes at a time, checked on the way.

Whole tensors are never copied: what is read is a view of the mapped file, what is computed
(dequantised, cast) has the size of a chunk.
"""

import math
from collections.abc import Iterator

import numpy as np

from convert.names import Match
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError
from glm2_jax.quant import Scheme, quantise, unpack_int4

CHUNK_ELEMENTS = 4 * 2**20

# The exponent bits of a two-byte float: all ones means infinity or NaN. Comparing bits is several
# times faster than numpy's isfinite on these types.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


class Values:
    """The elements of a matched tensor, in the published order.

    Args:
        match: the tensor.
        config: gives its shape.
        scheme: how the folder's matrices are quantised.

    Raises:
        CheckpointError: a scale that is NaN, infinite, zero or negative.
    """

    def __init__(self, match: Match, config: GLMConfig, scheme: Scheme | None = None):
        self.match, self.scheme = match, None if match.scale is None else scheme
        self.columns = match.rule.columns(config)
        array = match.tensor.read()
        if match.scale is None:
            self.flat = array.reshape(-1)
        else:
            rows = math.prod(match.rule.shape(config)) // self.columns
            self.matrix = array.reshape(rows, -1)
            self.scales = match.scale.read().astype(np.float32).reshape(rows, -1)
            _check_scales(match, self.scales)

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

    def quantised(
        self, start: int, stop: int, scheme: Scheme
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, integers [rows, ...], float32 scales [rows, groups]) over whole rows.

        Rows are counted from `start`. What is stored in that scheme is passed on as it is.

        Raises:
            CheckpointError: NaN or infinity, named.
        """
        step = max(CHUNK_ELEMENTS // self.columns, 1) * self.columns
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            rows = slice(begin // self.columns, end // self.columns)
            if self.scheme == scheme:
                values, scales = self.matrix[rows], self.scales[rows]
            else:
                _, chunk = next(self.chunks(begin, end))
                values, scales = quantise(chunk.reshape(-1, self.columns), scheme)
            yield (begin - start) // self.columns, values, scales.reshape(len(values), -1)

    def _values(self, begin: int, end: int) -> np.ndarray:
        if self.scheme is None:
            return self.flat[begin:end]
        rows = slice(begin // self.columns, end // self.columns)
        packed, scales = self.matrix[rows], self.scales[rows]
        whole = unpack_int4(packed) if self.scheme.bits == 4 else packed
        grouped = whole.astype(np.float32).reshape(*scales.shape, -1)
        return (grouped * scales[..., None]).reshape(-1)


def _check_scales(match: Match, scales: np.ndarray) -> None:
    bad = scales[~(np.isfinite(scales) & (scales > 0))]
    if len(bad):
        raise CheckpointError(
            f"{match.name}_scale holds {bad[0]}, and {len(bad)} such numbers in all.",
            "A scale is finite and above zero.",
            "Download the file again and compare its sha256 with the published one.",
        )


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
