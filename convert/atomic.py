"""Writes a folder that is either there, complete, or not there at all.

It is filled under a temporary name beside its final one and renamed at the end. A process that is
killed leaves the temporary folder behind; `remove_leftovers`, called before the next writing,
removes it. Whether its
owner still lives is told by a lock on it, which the system drops when the owner dies.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glm2_jax.errors import InputError


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Gives a temporary folder; on success it gets the name `destination`, on any failure
    (Ctrl-C and SIGTERM included) it is removed and what had that name before stays as it was.

    Args:
        destination: the final name; a folder that has it already is replaced.

    Raises:
        InputError: the disk is full, or the place cannot be written.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=_prefix(destination, "tmp"), dir=destination.parent)
        )
    except OSError as error:
        raise _cannot_write(destination, error) from error
    lock = _lock(temporary)
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        fsync(temporary)
        _put_in_place(temporary, destination)
    except OSError as error:
        raise _cannot_write(destination, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def require_space(destination: Path, needed: int) -> None:
    """Refuses to begin what cannot be finished.

    Raises:
        InputError: the disk has less than `needed` bytes free.
    """
    place = destination.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"There is not enough space for {destination}.",
            f"{needed} bytes are needed and {free} are free.",
            "Free some space or write to another disk.",
        )


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(destination: Path) -> None:
    """Removes temporary folders of dead processes. One that was stopped between its two last
    renames has moved the old folder aside; that one gets its name back."""
    parent = destination.parent
    if not parent.is_dir():
        return
    for old in parent.glob(_prefix(destination, "old") + "*"):
        if not destination.exists():
            old.rename(destination)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for leftover in parent.glob(_prefix(destination, "tmp") + "*"):
        lock = _lock(leftover)
        if lock is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)


def _prefix(destination: Path, kind: str) -> str:
    return f".{destination.name}.{kind}-"


def _lock(folder: Path) -> int | None:
    """A lock that lasts as long as the process; None where another one holds it, or the file
    system has no locks (then nothing is taken for a leftover)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _put_in_place(temporary: Path, destination: Path) -> None:
    """Two renames where there is something to replace; the first is undone if the second fails."""
    if not destination.exists():
        temporary.rename(destination)
    else:
        old = destination.parent / temporary.name.replace(".tmp-", ".old-")
        destination.rename(old)
        try:
            temporary.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
        shutil.rmtree(old, ignore_errors=True)
    fsync(destination.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cannot_write(destination: Path, error: OSError) -> InputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return InputError(
        f"{destination} cannot be written: {error.strerror or error}.",
        "Nothing was left behind.",
        "Free some space or write to another disk." if full else "Check the path and its rights.",
    )
