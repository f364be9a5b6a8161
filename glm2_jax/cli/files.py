"""Writes a folder, or a file, that is either there, complete, or not there at all.

It is filled under a temporary name beside its final one and renamed at the end; a folder that it
replaces is moved aside for the moment between two renames. A process that is killed leaves these
behind: the next one calls `restore` and `remove_leftovers`. Whether their owner still lives is told
by a lock on the temporary folder, which the system drops when the owner dies.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from glm2_jax.cli.interrupt import always
from glm2_jax.errors import InputError, UsageError

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


@contextmanager
def new_folder(destination: Path, may_replace: Callable[[], None]) -> Iterator[Path]:
    """Gives a temporary folder; on success it gets the name `destination`, on any failure (Ctrl-C,
    SIGTERM and SIGHUP included) it is removed and what had that name before stays as it was.

    Args:
        destination: the final name.
        may_replace: called at the end if something other than an empty folder has that name;
            raises if it must stay.

    Raises:
        InputError: the disk is full, or the place cannot be written.
    """
    token = secrets.token_hex(8)
    temporary, old = _beside(destination, "tmp", token), _beside(destination, "old", token)
    replaced = False

    def put_back() -> None:
        if replaced:
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            with contextlib.suppress(OSError):
                old.rename(destination)

    with _filling(destination, temporary, put_back):
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        fsync(temporary)
        try:
            temporary.rename(destination)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            may_replace()
            destination.rename(old)
            temporary.rename(destination)
            replaced = True
        fsync(destination.parent)


@contextmanager
def new_file(destination: Path, refuse: Callable[[], None]) -> Iterator[Path]:
    """Gives the path of a file to write, in a temporary folder; on success it gets the name
    `destination`, on any failure it is removed. Nothing is ever replaced.

    Args:
        destination: the final name.
        refuse: called at the end if something has that name by then; raises.

    Raises:
        InputError: the disk is full, or the place cannot be written.
    """
    temporary = _beside(destination, "tmp", secrets.token_hex(8))
    with _filling(destination, temporary, lambda: None):
        path = temporary / "new"
        yield path
        fsync(path)
        try:
            os.link(path, destination)  # unlike a rename, it replaces nothing
        except OSError:  # the name is taken, or the file system knows no links
            if os.path.lexists(destination):
                refuse()
            path.rename(destination)
        fsync(destination.parent)


@contextmanager
def _filling(destination: Path, temporary: Path, put_back: Callable[[], None]) -> Iterator[None]:
    """Makes a folder for what is to become `destination`; in the end it is gone, whatever happens,
    and so are new parents that hold nothing. `put_back` is called first, perhaps twice."""
    new_parents = [parent for parent in destination.parents if not os.path.lexists(parent)]
    lock = None

    def tidy() -> None:
        put_back()
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()

    try:
        with always(tidy):
            destination.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(mode=0o700)
            lock = _lock(temporary)
            yield
    except OSError as error:
        raise _cannot_write(destination, error) from error
    finally:
        if lock is not None:
            os.close(lock)


def require_writable(destination: Path) -> None:
    """Refuses a place in which no folder can be made.

    Raises:
        InputError: with the reason.
    """
    try:
        place = _nearest(destination)
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        attempt = place / _beside(destination, "tmp", secrets.token_hex(8)).name
        attempt.mkdir()  # rights alone do not tell: those of /proc allow it
        with contextlib.suppress(FileNotFoundError):  # another process has tidied up
            attempt.rmdir()
    except OSError as error:
        raise _cannot_write(destination, error) from error


def require_space(destination: Path, needed: int) -> None:
    """Refuses to begin what cannot be finished.

    Raises:
        InputError: the disk has less than `needed` bytes free.
    """
    free = shutil.disk_usage(_nearest(destination)).free
    if free < needed:
        raise InputError(
            f"There is not enough space for {destination}.",
            f"{needed} bytes are needed and {free} are free.",
            "Free some space or write to another disk.",
        )


def fsync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def moved_aside(destination: Path) -> Path | None:
    """Where a process that was killed between its two last renames has put the old folder."""
    if os.path.lexists(destination):
        return None
    return next((old for old in _ours(destination, "old") if not _in_use(_twin(old))), None)


def restore(destination: Path) -> None:
    """Gives a folder that was moved aside its name back."""
    old = moved_aside(destination)
    if old is not None:
        with contextlib.suppress(OSError):
            old.rename(destination)


def remove_leftovers(destination: Path) -> None:
    """Removes what dead processes have left; call it when `destination` may be written."""
    for old in _ours(destination, "old"):
        if not _twin(old).exists():  # the new folder has got its name
            shutil.rmtree(old, ignore_errors=True)
    for temporary in _ours(destination, "tmp"):
        lock = None if _twin(temporary).exists() else _lock(temporary)
        if lock is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def _beside(destination: Path, kind: str, token: str) -> Path:
    return destination.parent / f".{destination.name}.{kind}-{token}"


def _twin(path: Path) -> Path:
    """The temporary folder that an old one was moved aside for, or the other way round."""
    start, token = path.name.rsplit("-", 1)
    kind = "old" if start.endswith("tmp") else "tmp"
    return path.with_name(f"{start[:-3]}{kind}-{token}")


def _ours(destination: Path, kind: str) -> list[Path]:
    """Real folders of this user whose names are exactly as `new_folder` makes them."""
    shape = re.compile(re.escape(f".{destination.name}.{kind}-") + "[0-9a-f]{16}")
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(destination.parent.iterdir()):
            if shape.fullmatch(path.name):
                info = path.lstat()
                if stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid():
                    found.append(path)
    return found


def _in_use(temporary: Path) -> bool:
    if not temporary.exists():
        return False
    lock = _lock(temporary)
    if lock is not None:
        os.close(lock)
    return lock is None


def _lock(folder: Path) -> int | None:
    """A lock that lasts as long as the process; None where another one holds it, or the file
    system has no locks (then nothing is taken for a leftover)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _nearest(destination: Path) -> Path:
    """The last folder on the way to `destination` that is there already."""
    place = destination.parent
    while not place.exists():
        place = place.parent
    return place


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


# Also what is left of the two slashes in a `Path`. A single letter is a drive of Windows.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


_DOWNLOAD = "Download it first; a model on a hub is OWNER/NAME with --source hf or modelscope."


_FIXES = {
    "gs": "Copy it first (gcloud storage cp -r), or mount the bucket (gcsfuse).",
    "s3": "Copy it first (aws s3 cp --recursive), or mount the bucket (mount-s3).",
    "file": "Leave file:// out.",
    "http": _DOWNLOAD,
    "https": _DOWNLOAD,
}


def refuse_url(path: str | os.PathLike) -> None:
    """Refuses gs://, s3://, https:// and their like, and what no file system can have as a name.

    Raises:
        UsageError: such a path; what to do instead is said.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise UsageError(f"{text[:500]} is not a path.", "It holds a NUL character.", "Remove it.")
    found = _URL.match(text)
    if found is not None:
        raise UsageError(
            f"{text[:500]} is not a path of the file system.",
            "Files are read and written there alone, not in other storage or over the network.",
            _FIXES.get(found[1].lower(), "Copy it first."),
        )


def real_path(path: str | os.PathLike) -> Path:
    """Return the path without links in it; what is missing at its end stays as it is.

    Raises:
        UsageError: no path, as in `refuse_url`. InputError: links that lead back to themselves.
    """
    refuse_url(path)
    real = Path(os.path.realpath(path))
    if os.path.islink(real):  # not `real.is_symlink`, which raises where a name is too long
        raise InputError(
            f"{os.fspath(path)} cannot be opened.",
            "It is a symbolic link that leads back to itself.",
            "Remove the link, or choose another name.",
        )
    return real


BUCKET = "gs://"  # of Google Cloud Storage


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file under a temporary name and rename it to `path`.

    Raises:
        OSError: it cannot be written; `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
