"""Writes safetensors files as a stream: the header first, then the tensors chunk by chunk.

The library's own writer wants all tensors of a file in memory at once; here it is one chunk.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from convert.manifest import FileEntry
from convert.safetensors_file import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_MULTIPLE = 64  # so that mapped tensors begin at aligned addresses


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes:
        name: in the file.
        shape: in the file.
        dtype: in the file.
        chunks: gives its elements in order, as arrays of `dtype`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class HashingFile:
    """A file that knows its size and sum when it is closed."""

    def __init__(self, path: Path):
        self.path, self.size, self.digest = path, 0, hashlib.sha256()
        self.file = path.open("xb")

    def write(self, data) -> None:
        """Appends bytes, or anything that can be seen as bytes."""
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *exception: object) -> None:
        with self.file:
            if exception[0] is None:
                self.file.flush()
                os.fsync(self.file.fileno())

    @property
    def entry(self) -> FileEntry:
        """For the manifest."""
        return FileEntry(self.size, self.digest.hexdigest())


def write_file(path: Path, data: bytes) -> FileEntry:
    """Writes a small file and waits until it is on the disk."""
    with HashingFile(path) as file:
        file.write(data)
    return file.entry


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    max_shard_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, FileEntry]:
    """Writes tensors as one file, or as shards with an index.

    Args:
        folder: exists.
        entries: the tensors, in the order they are written.
        max_shard_size: bytes; a single larger tensor gets a shard of its own.
        progress: called with the bytes written and to write.

    Returns:
        file name -> size and sum.
    """
    shards = _divide(entries, max_shard_size)
    total = sum(entry.nbytes for entry in entries)
    done, files, weight_map = 0, {}, {}
    for i, shard in enumerate(shards):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {entry.name: name for entry in shard}
        with HashingFile(folder / name) as file:
            file.write(_header(shard))
            for entry in shard:
                for chunk in entry.chunks():
                    data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
                    file.write(data.data)
                    done += len(data)
                    progress(done, total)
        files[name] = file.entry
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        name = "model.safetensors.index.json"
        files[name] = write_file(folder / name, json.dumps(index, indent=2).encode())
    return files


def _divide(entries: Sequence[Entry], max_shard_size: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _header(entries: Sequence[Entry]) -> bytes:
    table, position = {}, 0
    for entry in entries:
        end = position + entry.nbytes
        kind = _NAMES[entry.dtype]
        table[entry.name] = {
            "dtype": kind,
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps({"__metadata__": {"format": "np"}, **table}).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_MULTIPLE)
    return len(text).to_bytes(8, "little") + text
