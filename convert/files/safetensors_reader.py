"""Reads the header of a `.safetensors` file strictly and leaves the tensors where they are.

The format: 8 bytes of header length, a JSON object name -> {dtype, shape, data_offsets}, then the
bytes of the tensors without gaps. The safetensors library copies what it reads; a view of the
mapped file does not.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from convert.files.tensor import BFLOAT16, StoredTensor, check_shape, regular_file_size
from glm2_jax.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


def read_safetensors_file(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a `.safetensors` file.

    Args:
        path: the file.

    Returns:
        name -> tensor, in the order of the header.

    Raises:
        CheckpointError: truncated, or a header that does not describe the file exactly.
    """
    size = regular_file_size(path)
    with path.open("rb") as file:
        start = file.read(8)
        header_length = int.from_bytes(start, "little")
        if start.startswith(b"PK\x03\x04"):
            raise CheckpointError(
                f"{path} is a file of torch.save, not a safetensors file.",
                fix="Give it a name that ends in .bin, and name it so in its index if it has one.",
            )
        if len(start) == 8 and header_length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} is not a safetensors file.",
                f"Its header would have {header_length} bytes; {MAX_HEADER_BYTES} are the limit.",
            )
        if len(start) < 8 or 8 + header_length > size:
            raise _truncated(path, 8 + header_length * (len(start) == 8), size, "at least ")
        header = _parse(path, file.read(header_length))
    header.pop("__metadata__", None)
    data_start, position = 8 + header_length, 0
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, begin, end = _entry(entry)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"the entry of {name[:200]!r} is wrong ({str(error)[:200]})"
            raise _bad(path, reason) from error
        tensors[name] = StoredTensor(path, dtype, shape, data_start + begin)
        spans.append((begin, end))
    for begin, end in sorted(spans):  # no gap, no overlap
        if begin != position:
            raise _bad(path, f"its tensors overlap or leave a gap at byte {position} of the data")
        position = end
    extra = size - data_start - position
    if extra < 0:
        raise _truncated(path, data_start + position, size)
    if extra:
        raise _bad(path, f"{extra} bytes follow the last tensor")
    return tensors


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise _bad(path, "its header is not a JSON object")
    try:
        return json.loads(header.decode("utf-8"), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header cannot be parsed ({str(error)[:200]})") from error


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a duplicate name: for `json.loads(object_pairs_hook=...)`."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name[:200]!r} appears twice")
        result[name] = value
    return result


def _entry(entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {str(entry['dtype'])[:20]} is not supported")
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    begin, end = entry["data_offsets"]
    if not isinstance(shape, list):
        raise ValueError("its shape is not a list")
    for number in (*shape, begin, end):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**62:
            raise ValueError(f"{str(number)[:40]} is not a size")
    check_shape(shape)
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"shape {shape} of {dtype.name} does not fill {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _bad(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a valid safetensors file: {reason}.", fix="Download it again."
    )


def _truncated(path: Path, expected: int, size: int, least: str = "") -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated.",
        f"It should have {least}{expected} bytes and has {size}.",
        "Download it again.",
    )
