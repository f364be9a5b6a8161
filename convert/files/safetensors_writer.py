"""Writes safetensors files as a stream: the header first, then the tensors chunk by chunk.

The library's writer needs all tensors of a file in memory at once; here it is one chunk.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from convert.files.manifest import FileEntry
from convert.files.safetensors_reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_MULTIPLE = 64  # so that mapped tensors begin at aligned addresses


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write; `chunks` yields its elements in order, as arrays of `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class HashingFile:
    """A new file that knows its size and checksum."""

    def __init__(self, path: Path):
        self.size, self.digest = 0, hashlib.sha256()
        self.file = path.open("xb")

    def write(self, data) -> None:
        """Append bytes, or a view of bytes."""
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
        """What the manifest says of it."""
        return FileEntry(self.size, self.digest.hexdigest())


def write_file(path: Path, data: bytes) -> FileEntry:
    """Write a small file and wait until it is on the disk."""
    with HashingFile(path) as file:
        file.write(data)
    return file.entry


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    max_shard_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    framework: str = "np",
) -> dict[str, FileEntry]:
    """Write tensors in order as one file, or as shards with an index: name -> size and checksum.

    `progress` is called with the bytes written and to write; `framework` is whose tensors the files
    say they hold: transformers wants "pt".
    """
    shards = divide(entries, max_shard_size)
    count, total = len(shards), sum(entry.nbytes for entry in entries)
    done, files, places = 0, {}, {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        with HashingFile(folder / name) as file:
            file.write(_header(shard, framework))
            for entry in shard:
                places[entry.name] = name
                for chunk in entry.chunks():
                    file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
                    done += chunk.nbytes
                    progress(done, total)
        files[name] = file.entry
    if count > 1:
        name, index = "model.safetensors.index.json", {"metadata": {"total_size": total}}
        data = json.dumps(index | {"weight_map": places}, indent=2).encode()
        files[name] = write_file(folder / name, data)
    return files


def divide(entries: Sequence[Entry], max_shard_size: int) -> list[list[Entry]]:
    """Assign tensors in order to shards; one above `max_shard_size` bytes gets its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _header(entries: Sequence[Entry], framework: str) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": framework}}
    position = 0
    for entry in entries:
        offsets = [position, position := position + entry.nbytes]
        table[entry.name] = {
            "dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets,
        }  # fmt: skip
    text = json.dumps(table).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_MULTIPLE)
    return len(text).to_bytes(8, "little") + text
