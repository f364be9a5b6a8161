"""Writes the zip format of `torch.save` without torch, for tests of the reader."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES = {
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.int64): "LongStorage",
}


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def _numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def pickle_global(module: str, name: str) -> bytes:
    """The opcode that names a global."""
    return f"c{module}\n{name}\n".encode()


def tensor_pickle(
    key: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    *,
    numel: int | None = None,
    offset: int = 0,
    strides: tuple[int, ...] | None = None,
) -> bytes:
    """The opcodes that rebuild one tensor, as torch writes them."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    numel = int(np.prod(shape)) if numel is None else numel
    storage = b"(" + _text("storage") + pickle_global("torch", _STORAGES[np.dtype(dtype)])
    storage += _text(key) + _text("cpu") + _number(numel) + b"tQ"
    hooks = pickle_global("collections", "OrderedDict") + b")R"
    arguments = b"(" + storage + _number(offset) + _numbers(shape) + _numbers(strides)
    rebuild = pickle_global("torch._utils", "_rebuild_tensor_v2")
    return rebuild + arguments + b"\x89" + hooks + b"tR"


def state_dict_pickle(entries: dict[str, bytes]) -> bytes:
    """A whole pickle: name -> opcodes of the value, in an ordered dictionary."""
    items = b"".join(_text(name) + value for name, value in entries.items())
    return b"\x80\x02" + pickle_global("collections", "OrderedDict") + b")R(" + items + b"u."


def write_members(path: Path, members: dict[str, bytes], *, compressed: bool = False) -> None:
    """Writes an archive; tensors' bytes are aligned to 64 as torch aligns them."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = kind
            start = archive.fp.tell() + 30 + len(name)  # type of fp: a file opened for writing
            padding = -(start + 4) % 64
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            archive.writestr(info, data)


def write_torch_file(path: Path, tensors: dict[str, np.ndarray], **kwargs: Any) -> None:
    """Writes the tensors as `torch.save(OrderedDict(...), path)` would."""
    entries: dict[str, bytes] = OrderedDict()
    members: dict[str, bytes] = {}
    for key, (name, array) in enumerate(tensors.items()):
        entries[name] = tensor_pickle(str(key), array.dtype, array.shape)
        members[f"archive/data/{key}"] = np.ascontiguousarray(array).tobytes()
    head = {"archive/data.pkl": state_dict_pickle(entries), "archive/byteorder": b"little"}
    write_members(path, head | members | {"archive/version": b"3\n"}, **kwargs)
