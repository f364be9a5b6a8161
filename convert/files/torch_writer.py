"""Writes tensors as `torch.save` does, without torch: a zip archive of one pickle that names the
tensors, and of the bytes of each, which begin at multiples of 64."""

import io
import pickle
import zipfile
from collections.abc import Mapping

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
_ALIGNED = 64
_HEADER = 30  # bytes of an entry's header before its name


def torch_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the file of an ordered dictionary of float tensors."""
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as archive:
        _add(archive, found, "data.pkl", _dictionary(tensors))
        _add(archive, found, "byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            _add(archive, found, f"data/{key}", np.ascontiguousarray(array).tobytes())
        _add(archive, found, "version", b"3\n")
    return found.getvalue()


def _add(archive: zipfile.ZipFile, file: io.BytesIO, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")  # of a fixed date
    padding = -(file.tell() + _HEADER + len(info.filename) + 4) % _ALIGNED
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    archive.writestr(info, data)


def _dictionary(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the pickle, whose tensors refer to storages by their numbers."""
    empty = _named("collections", "OrderedDict") + b")R"
    items = b"".join(
        _value(name) + _tensor(str(key), array, empty)
        for key, (name, array) in enumerate(tensors.items())
    )
    return b"\x80\x02" + empty + b"(" + items + b"u."


def _tensor(key: str, array: np.ndarray, hooks: bytes) -> bytes:
    kind = _named("torch", _STORAGES[array.dtype.name])
    place = b"(" + _value("storage") + kind + b"".join(map(_value, (key, "cpu", array.size))) + b"t"
    strides = tuple(x // array.itemsize for x in np.ascontiguousarray(array).strides)
    shape = _value(0) + _value(array.shape) + _value(strides) + _value(False)
    rebuild = _named("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + place + b"Q" + shape + hooks + b"tR"


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _value(value: str | int | tuple[int, ...]) -> bytes:
    """Return the opcodes of a plain value, which nothing refers to again."""
    pickler = io.BytesIO()
    plain = pickle.Pickler(pickler, protocol=2)
    plain.fast = True  # no numbers for values that come again
    plain.dump(value)
    return pickler.getvalue()[2:-1]
