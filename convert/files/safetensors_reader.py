"""Reads the header of a `.safetensors` file strictly and leaves the tensors where they are.

The format: 8 bytes of header length, a JSON object name -> {dtype, shape, data_offsets}, then the
bytes of the tensors without gaps. The safetensors library copies what it reads; a view of the
mapped file does not.
"""

import codecs
from pathlib import Path
from typing import Any

import numpy as np

from convert.files.tensor import BFLOAT16, StoredTensor, bad_file, check_shape, regular_file_size
from glm2_jax.cli.text_input import parse_line
from glm2_jax.errors import CheckpointError, InputError

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
    """List the tensors of a `.safetensors` file, in the order of its header.

    A `CheckpointError` where it is truncated, or its header does not describe it exactly.
    """
    size = regular_file_size(path)
    with path.open("rb") as file:
        start = file.read(8)
        data_start = 8 + int.from_bytes(start, "little")
        if start.startswith(b"PK\x03\x04"):
            raise CheckpointError(
                f"{path} is a file of torch.save, not a safetensors file.",
                fix="Give it a name that ends in .bin, and name it so in its index if it has one.",
            )
        if data_start > MAX_HEADER_BYTES and len(start) == 8:
            why = f"Its header would have {data_start - 8} bytes; {MAX_HEADER_BYTES} is the limit."
            raise bad_file(path, "is not a safetensors file", why)
        if len(start) < 8 or data_start > size:
            raise bad_file(path, "is truncated", f"It ends inside its header, after {size} bytes.")
        header = parse_json(path, file.read(data_start - 8))
    if not isinstance(header, dict):
        raise bad_file(path, "has a header that is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            tensors[name] = _stored(path, entry, data_start)
        except (ValueError, KeyError, TypeError) as error:
            what = f"has a wrong entry of the tensor {name[:200]!r}"
            raise bad_file(path, what, f"{str(error)[:200]}.") from error
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != position:
            at = position - data_start
            raise bad_file(
                path, f"has tensors that overlap or leave a gap at byte {at} of the data"
            )
        position += tensor.nbytes
    if position != size:
        kind = "is truncated" if position > size else "does not end with its tensors"
        raise bad_file(path, kind, f"It should have {position} bytes and has {size}.")
    return tensors


def parse_json(path: Path, data: bytes) -> Any:
    """Parse UTF-8 JSON from a file; a duplicate name is an error."""
    try:
        return parse_line(data.removeprefix(codecs.BOM_UTF8))
    except InputError as error:
        raise bad_file(path, "cannot be parsed", error.why or error.what) from error


def _stored(path: Path, entry: dict[str, Any], data_start: int) -> StoredTensor:
    """Return the tensor that an entry of the header describes; ValueError and others if none."""
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {str(entry['dtype'])[:20]} is not supported")
    for number in (*shape, begin, end):
        if type(number) is not int or not 0 <= number < 2**62:
            raise ValueError(f"{str(number)[:40]} is not a size")
    check_shape(shape)
    tensor = StoredTensor(path, DTYPES[entry["dtype"]], tuple(shape), data_start + begin)
    if tensor.nbytes != end - begin:
        kind = f"shape {shape} of {tensor.dtype.name}"
        raise ValueError(f"{kind} does not fill {end - begin} bytes")
    return tensor
