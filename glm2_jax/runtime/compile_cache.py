"""The persistent compilation cache: a program that was compiled once starts at once the next time.

Only the command-line tools turn it on; a library should not write to a user's folders unasked.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VARIABLE = "GLM2_JAX_COMPILE_CACHE"
OFF = "off"
MAX_BYTES = 2 * 1024**3
_SUM = 32  # bytes of a SHA-256
_FOLDER = "programs"  # not "xla", where earlier versions kept programs without checksums


def default_folder() -> Path:
    """Return the folder of $GLM2_JAX_COMPILE_CACHE, or the one in the user's cache folder."""
    return user_cache(_FOLDER, VARIABLE) or Path(OFF)


def user_cache(
    name: str, variable: str, chosen: str | os.PathLike[str] | None = None
) -> Path | None:
    """Return a folder in the user's cache folder, or the one that was chosen; None if it is "off".

    Args:
        name: of the folder.
        variable: environment variable that may choose another one.
        chosen: the choice; comes before the variable.

    Raises:
        RuntimeError: there is no home folder.
    """
    chosen = chosen or os.environ.get(variable)
    if chosen:
        path = Path(chosen).expanduser()
        return None if str(path) == OFF else path
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # unset, or to be ignored as the XDG specification says
        base = Path.home() / ".cache"
    return Path(base) / "glm2-jax" / name


def enable_compile_cache(
    folder: str | os.PathLike | None = None, *, warn: Callable[[str], None] = lambda line: None
) -> Path | None:
    """Keep compiled programs in `folder`; call it before anything is compiled.

    The folder must belong to the user: programs in it are loaded and run as they are.

    Args:
        folder: None = `default_folder()`; "off" (here or in the variable) = no cache.
        warn: called with one line if there is no cache, or if something in it is wrong.

    Returns:
        The folder, or None if there is no cache.
    """
    try:
        path = user_cache(_FOLDER, VARIABLE, folder)
        if path is None:
            return None
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        trim(path, MAX_BYTES)  # JAX's own limit takes a lock that fails on some network disks
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"{path} is not writable")
    except (OSError, RuntimeError, ValueError) as error:  # no home folder; a NUL in the name
        warn(f"warning: no compilation cache, every start compiles again ({error})")
        return None

    import jax  # late, so that flags can be checked without it

    jax.config.update("jax_compilation_cache_dir", str(path))
    # Small programs count too: the bundled model consists of nothing else.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _check_programs(warn)
    return path


class Lookup(logging.Filter):
    """Reports whether JAX finds a program, which is compiled inside, in its cache.

    Before it compiles, which may take minutes, JAX reports that only in its log. Threads take
    turns, because they share the level of that log.

    Args:
        missed: called once if the program is not in the cache, as a rule before it is compiled.

    Attributes:
        found: whether it was in the cache.
    """

    _turn = threading.Lock()

    def __init__(self, missed: Callable[[], None]):
        super().__init__()
        self.found, self._missed = False, missed
        self._log = logging.getLogger("jax._src.compiler")

    def __enter__(self) -> Lookup:
        import jax

        config: Any = jax.config  # its attributes are made at run time
        if config.jax_compilation_cache_dir is None or not config.jax_enable_compilation_cache:
            self._miss()
        self._turn.acquire()
        self._thread = threading.get_ident()
        self._shown, self._level = self._log.getEffectiveLevel(), self._log.level
        self._log.addFilter(self)
        self._log.setLevel(logging.DEBUG)
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        self._log.setLevel(self._level)
        self._log.removeFilter(self)
        self._turn.release()
        if not self.found and kind is None:
            self._miss()

    def filter(self, record: logging.LogRecord) -> bool:
        """Read a record of this thread; it passes if it would pass without this filter."""
        message = str(record.msg).lower() if record.thread == self._thread else ""
        if message.startswith("persistent compilation cache hit"):
            self.found = True
        elif message.startswith("persistent compilation cache miss"):
            self._miss()
        return record.levelno >= self._shown

    def _miss(self) -> None:
        missed, self._missed = self._missed, lambda: None
        missed()


class _Checked:
    """A cache of JAX in which each program follows a checksum of its key and its bytes.

    JAX runs whatever has a program's name, and another program of the same shapes would compute
    wrong numbers without an error. An entry with a wrong checksum is deleted and compiled again.

    Args:
        cache: as JAX makes it: `get` and `put` by key.
        warn: called once with one line if an entry is wrong or cannot be read or written.
    """

    def __init__(self, cache: Any, warn: Callable[[str], None]):
        self._cache, self._warn = cache, warn
        self._path = cache._path  # JAX reads this name when it resets its cache
        self._folder = Path(self._path)

    def get(self, key: str) -> bytes | None:
        """Return the program, or None if it has to be compiled."""
        path = self._folder / f"{key}-cache"
        with self._deleted_if_unusable(path):
            plain = path.is_file() or not path.exists()  # a pipe or device may have no end
            data = self._cache.get(key) if plain else b""
            if data is None or data[:_SUM] == _sum(key, data[_SUM:]):
                return None if data is None else data[_SUM:]
            raise ValueError("damaged, replaced, or of an earlier version")
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keep a program."""
        with self._deleted_if_unusable(self._folder / f"{key}-cache"):
            self._cache.put(key, _sum(key, value) + value)

    @contextlib.contextmanager
    def _deleted_if_unusable(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            warn, self._warn = self._warn, lambda line: None
            warn(
                f"warning: a program of the compilation cache is unusable: {error}; it is "
                f"compiled again ({path.parent})"
            )
            with contextlib.suppress(OSError):
                path.unlink()


def _sum(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + value).digest()


def _check_programs(warn: Callable[[str], None]) -> None:
    """Have JAX make its cache a checked one; a cache that exists already stays as it is."""
    from jax._src import compilation_cache as jax_cache  # there is no public place for it

    make = getattr(jax_cache.get_file_cache, "unchecked", jax_cache.get_file_cache)

    def get_file_cache(path: str) -> tuple[Any, str] | None:
        made = make(path)
        return None if made is None else (_Checked(made[0], warn), made[1])

    get_file_cache.unchecked = make  # type: ignore[attr-defined]
    jax_cache.get_file_cache = get_file_cache


def trim(folder: Path, max_bytes: int) -> None:
    """Delete the oldest entries until the rest takes at most `max_bytes`."""
    files = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process trims as well
            info = path.stat()
            files.append((info.st_mtime, info.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size
