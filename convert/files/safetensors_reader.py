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

from convert.files.tensor import BFLOAT16, StoredTensor, bad_file, check_shape, regular_file_size
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
            why = f"Its header would have {header_length} bytes; {MAX_HEADER_BYTES} are the limit."
            raise bad_file(path, "is not a safetensors file", why)
        if len(start) < 8 or 8 + header_length > size:
            least = 8 + header_length * (len(start) == 8)
            why = f"It should have at least {least} bytes and has {size}."
            raise bad_file(path, "is truncated", why)
        data = file.read(header_length)
    if not data.startswith(b"{"):
        raise bad_file(path, "has a header that is not a JSON object")
    header = parse_json(path, data)
    header.pop("__metadata__", None)
    data_start, position = 8 + header_length, 0
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, begin, end = _entry(entry)
        except (ValueError, KeyError, TypeError) as error:
            what = f"has a wrong entry of the tensor {name[:200]!r}"
            raise bad_file(path, what, f"{str(error)[:200]}.") from error
        tensors[name] = StoredTensor(path, dtype, shape, data_start + begin)
        spans.append((begin, end))
    for begin, end in sorted(spans):  # no gap, no overlap
        if begin != position:
            what = f"has tensors that overlap or leave a gap at byte {position} of the data"
            raise bad_file(path, what)
        position = end
    if data_start + position != size:
        kind = "is truncated" if data_start + position > size else "does not end with its tensors"
        raise bad_file(path, kind, f"It should have {data_start + position} bytes and has {size}.")
    return tensors


def parse_json(path: Path, data: bytes) -> Any:
    """Parse UTF-8 JSON from a file; a duplicate name is an error."""
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise bad_file(path, "cannot be parsed", str(error)[:200]) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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
