"""A tensor inside a checkpoint file: where its bytes are, not the bytes themselves."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from glm2_jax.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**48
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of one file: `offset` is the byte where its first element begins, `strides` the
    bytes between neighbors per axis; None = row-major without gaps."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        return self.elements * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Return a read-only view of the file, whose pages are read as they are touched."""
        if not self.elements:
            return np.empty(self.shape, self.dtype)
        try:
            with reading(self.file):
                mapped = np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset)
            return np.ndarray(self.shape, self.dtype, buffer=mapped, strides=self.strides)
        except (ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"{self.file} was truncated while it was read.", str(error)[:200], "Try again."
            ) from error


def check_shape(shape: Sequence[int]) -> None:
    """Raise ValueError for what no array can be, also where one axis is 0 and others immense."""
    if len(shape) > _MAX_DIMENSIONS or math.prod(size or 1 for size in shape) > _MAX_ELEMENTS:
        raise ValueError(f"a tensor of {len(shape)} dimensions is too large")


def bad_file(path: Path, what: str, why: str = "") -> CheckpointError:
    """Return the error of a file that is damaged, or not what its name says."""
    return CheckpointError(f"{path} {what}.", why, "Download it again.")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system refuses inside into a `CheckpointError` that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{str(error.filename or path)[:500]} cannot be read.",
            error.strerror or str(error),
            "Check its name and its permissions.",
        ) from error


def is_plain_name(name: str) -> bool:
    """Return whether a name can only mean a file in the same folder, and prints as it is."""
    special = any(character in name for character in "/\\:") or name.startswith(".")
    return bool(name) and name.isprintable() and not special and len(name.encode()) <= 255


def regular_file_size(path: Path) -> int:
    """Return the size of a file in bytes, symbolic links followed.

    A `CheckpointError` where it is missing, a link to nothing, not a plain file, or a Git LFS
    pointer, which stands for a file that was never downloaded.
    """
    if not path.exists():
        what = "a symbolic link to a file that does not exist" if path.is_symlink() else "missing"
        why = "The checkpoint needs it; in a hub's cache, the download is incomplete."
        raise bad_file(path, f"is {what}", why)
    if not path.is_file():  # opening a pipe would block forever
        kind = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        raise CheckpointError(
            f"{path} is not a plain file.", f"It is {kind}.", "Put the file itself there."
        )
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights.",
                "The repository was cloned without Git LFS.",
                "Run `git lfs pull` in that folder, or download the file itself.",
            )
    return path.stat().st_size
