"""Paths of the file system, and outputs that appear complete or not at all.

An output is written inside `.NAME.unfinished`, next to its final place, under a lock, and renamed;
a folder that it replaces is kept there meanwhile. The next process that writes NAME restores or
removes what a killed one left.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from glm2_jax.cli.interrupt import always
from glm2_jax.cli.messages import note
from glm2_jax.errors import InputError, UsageError

BUCKET = "gs://"  # of Google Cloud Storage
# Also matches the one slash that `Path` leaves of two. A single letter is a drive of Windows.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def new_output(
    destination: Path, check: Callable[[], None], *, needed: int, folder: bool = True
) -> Iterator[Path]:
    """Give a temporary path that becomes `destination`, complete or not at all: a folder, or the
    name of a file that the caller makes.

    On any failure (Ctrl-C, SIGTERM and SIGHUP included) `destination` stays as it was. `check` is
    called if it exists, before and after the writing, and raises if it must stay. InputError: no
    space for `needed` bytes, not writable, or another process is writing it.
    """
    work = _work_folder(destination)
    new = work / "new"
    new_parents = [parent for parent in destination.parents if not os.path.lexists(parent)]
    require_writable(destination)
    try:
        with always(lambda: _remove_empty(new_parents)):
            destination.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir(mode=0o700, exist_ok=True)
            if work.is_symlink() or work.stat().st_uid != os.geteuid():
                raise PermissionError(errno.EACCES, f"{work} belongs to another user")
            with contextlib.ExitStack() as opened:
                locked = opened.enter_context(writer_lock(work / "lock", destination))
                if not locked and new.exists():
                    raise FileExistsError(errno.EEXIST, f"another process may be using {work}")
                opened.enter_context(always(lambda: _close(destination)))
                _settle(destination)
                if os.path.lexists(destination):
                    check()
                require_space(destination, needed)
                if folder:
                    new.mkdir()
                yield new
                fsync(new)
                if os.path.lexists(destination):
                    check()
                    if folder:
                        destination.rename(work / "old")
                new.rename(destination)
                fsync(destination.parent)
    except OSError as error:
        raise cannot_write_file(destination, error) from error


def current(destination: Path) -> Path:
    """Return where the content of `destination` is: a killed process may have moved it aside."""
    old = _work_folder(destination) / "old"
    return old if old.exists() and not os.path.lexists(destination) else destination


def _settle(destination: Path) -> None:
    """Put back what was moved aside and not replaced; remove what was not finished.

    In this order: another thread may be between the two last renames.
    """
    work = _work_folder(destination)
    old, new = work / "old", work / "new"
    shutil.rmtree(new, ignore_errors=True)
    with contextlib.suppress(OSError):
        new.unlink()
    if not old.exists():
        return
    if os.path.lexists(destination):
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(destination)


def _close(destination: Path) -> None:
    _settle(destination)
    work = _work_folder(destination)
    with contextlib.suppress(OSError):
        (work / "lock").unlink()
        work.rmdir()


def _work_folder(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.unfinished"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def writer_lock(path: Path, output: Path) -> contextlib.AbstractContextManager:
    """Lock a file, made if missing, until the returned context or the process ends.

    The context gives None where the file system has no locks. InputError: another process, which
    writes `output`, holds the lock.
    """
    from filelock import FileLock, Timeout  # takes longer to import than all of this module

    try:
        return FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False).acquire()
    except Timeout:
        raise InputError(
            f"Another process is writing {output}.",
            f"It holds the lock {path}.",
            "Wait for it to finish, or choose another output.",
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        note(f"warning: the file system of {path.parent} has no locks; run one at a time")
        return contextlib.nullcontext()


def require_writable(destination: Path) -> None:
    """Raise InputError for a place in which no folder can be made."""
    try:
        place = _nearest(destination)
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        # Try it, because permissions alone do not decide: those of /proc allow it.
        attempt = place / f"{_work_folder(destination).name}-{os.getpid()}"
        attempt.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # removed by another thread
            attempt.rmdir()
    except OSError as error:
        raise cannot_write_file(destination, error) from error


def require_space(destination: Path, needed: int) -> None:
    """Raise InputError if the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(_nearest(destination)).free
    if free < needed:
        raise InputError(
            f"There is not enough space for {destination}.",
            f"{needed} bytes are needed and {free} are free.",
            "Free some space or write to another disk.",
        )


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _nearest(destination: Path) -> Path:
    """Return the last folder on the way to `destination` that exists."""
    place = destination.parent
    while not place.exists():
        place = place.parent
    return place


def refuse_url(path: str | os.PathLike) -> None:
    """Raise UsageError for gs://, https:// and the like, and names that no file system allows."""
    text = os.fspath(path)
    if "\0" in text:
        raise UsageError(f"{text[:500]} is not a path.", "It holds a NUL character.", "Remove it.")
    if _URL.match(text):
        raise UsageError(
            f"{text[:500]} is not a path of the file system.",
            "Other storage and the network cannot be read or written directly.",
            "Copy it first, or mount the bucket (gcsfuse, mount-s3); a model on a hub is "
            "OWNER/NAME with --source hf or modelscope.",
        )


def real_path(path: str | os.PathLike) -> Path:
    """Return the path without links in it; what is missing at its end stays as it is.

    UsageError: no path, as in `refuse_url`. InputError: links that lead back to themselves.
    """
    refuse_url(path)
    real = Path(os.path.realpath(path))
    if os.path.islink(real):  # not `real.is_symlink`, which raises where a name is too long
        raise InputError(
            f"{os.fspath(path)} cannot be opened.",
            "It is a symbolic link that points to itself.",
            "Remove the link, or choose another name.",
        )
    return real


def require_file_place(path: str | os.PathLike) -> Path:
    """Return the path, links followed; InputError if no regular file can be written there."""
    real = real_path(path)
    if real.is_dir():
        raise InputError(f"cannot write {path}", "It is a folder.", "Name a file in it.")
    if real.exists() and not real.is_file():  # a rename would take the place of a device
        raise InputError(f"cannot write {path}", "It is not a regular file.", "Name another file.")
    if not real.parent.is_dir():
        raise InputError(f"cannot write {path}", f"folder not found: {real.parent}", "Create it.")
    if real.exists() and not os.access(real, os.W_OK):
        raise InputError(f"cannot write {path}", "The file is read-only.", "Name another file.")
    require_writable(real)
    return real


@contextlib.contextmanager
def new_file(path: Path, check: Callable[[], None], *, needed: int = 0) -> Iterator[Path]:
    """Give a temporary path for a file, as `new_output`; one that it replaces keeps its mode."""
    with new_output(path, check, needed=needed, folder=False) as new:
        yield new
        if path.exists():
            new.chmod(stat.S_IMODE(path.stat().st_mode))


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, complete or not at all; one that it replaces keeps its mode."""
    with new_file(path, lambda: None, needed=len(data)) as new:
        new.write_bytes(data)


def cannot_write_file(path: Path, error: OSError) -> InputError:
    """Return the error of a file or folder that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return InputError(
        f"cannot write {path}",
        error.strerror or str(error),
        "Free some space, or write to another disk."
        if full
        else "Check the path and its permissions.",
    )
