"""Writes `.bin` files as `torch.save` does, without torch and without holding a tensor whole.

The archive has the members that torch writes, uncompressed and aligned: `data.pkl`, which names
and shapes the tensors, and `data/<n>` with their bytes. `torch.load(weights_only=True)` reads it.
"""

import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from convert.files.safetensors_writer import Entry, divide, index_of, write_file
from convert.files.tensor import BFLOAT16

_STORAGES = {
    np.dtype(np.float16): "HalfStorage",
    BFLOAT16: "BFloat16Storage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int8): "CharStorage",
}
_PREFIX = "archive"
_ALIGNMENT = 64  # of a member's first byte in the file, as torch aligns it for mapping
_LARGE = 2**30  # bytes of a member from which on its sizes are written in 64 bits


def write_torch_shards(
    folder: Path,
    entries: Sequence[Entry],
    max_shard_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes tensors as pytorch_model.bin, or as shards with an index.

    Args:
        folder: exists.
        entries: the tensors, in the order they are written.
        max_shard_size: bytes; a single larger tensor gets a shard of its own.
        progress: called with the bytes written and to write.
    """
    shards = divide(entries, max_shard_size, "pytorch_model", "bin")
    done, total = 0, sum(entry.nbytes for entry in entries)

    def count(written: int) -> None:
        nonlocal done
        done += written
        progress(done, total)

    for name, shard in shards.items():
        write_torch_file(folder / name, shard, count)
    if len(shards) > 1:
        write_file(folder / "pytorch_model.bin.index.json", index_of(shards))


def write_torch_file(
    path: Path, entries: Sequence[Entry], count: Callable[[int], None] = lambda written: None
) -> None:
    """Writes one file and waits until it is on the disk.

    Args:
        path: must not exist.
        entries: the tensors, in order.
        count: called with the number of bytes written since the last call.
    """
    with path.open("xb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _add_bytes(archive, "data.pkl", _state_dict(entries))
            _add_bytes(archive, "byteorder", b"little")
            for key, entry in enumerate(entries):
                _add(archive, f"data/{key}", entry.nbytes, entry.byte_chunks(), count)
            _add_bytes(archive, "version", b"3\n")
        file.flush()
        os.fsync(file.fileno())


def _add_bytes(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    _add(archive, name, len(data), [memoryview(data)], lambda written: None)


def _add(
    archive: zipfile.ZipFile,
    name: str,
    size: int,
    chunks: Iterable[memoryview],
    count: Callable[[int], None],
) -> None:
    """Adds a member; zipfile goes back and fills in its checksum at the end."""
    info = zipfile.ZipInfo(f"{_PREFIX}/{name}")
    info.file_size = size
    large = size >= _LARGE
    assert archive.fp is not None  # open for writing
    header = 30 + len(info.filename) + (20 if large else 0) + 4  # the last 4: before the padding
    start = archive.fp.tell() + header
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as member:
        for chunk in chunks:
            member.write(chunk)
            count(len(chunk))


def _state_dict(entries: Sequence[Entry]) -> bytes:
    """The pickle of an ordered dictionary name -> tensor (protocol 2, as torch writes it).

    The classes that it names are not there to be pickled, so its opcodes are put together here.
    """
    items = b"".join(
        _text(entry.name) + _tensor(str(key), entry) for key, entry in enumerate(entries)
    )
    return b"\x80\x02" + _global("collections", "OrderedDict") + b")R(" + items + b"u."


def _tensor(key: str, entry: Entry) -> bytes:
    """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward_hooks)."""
    strides = tuple(math.prod(entry.shape[i + 1 :]) for i in range(len(entry.shape)))
    kind = _global("torch", _STORAGES[entry.dtype])
    numel = _number(math.prod(entry.shape))
    storage = b"(" + _text("storage") + kind + _text(key) + _text("cpu") + numel + b"tQ"
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = storage + _number(0) + _numbers(entry.shape) + _numbers(strides) + b"\x89" + hooks
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]  # without the frame of a whole pickle
