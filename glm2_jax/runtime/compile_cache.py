"""The persistent compilation cache: what was compiled once starts at once the next time.

Only the command-line tools turn it on; a library should not write to a user's folders unasked.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "GLM2_JAX_COMPILE_CACHE"
OFF = "off"
MAX_BYTES = 2 * 1024**3
_SUM = 32  # bytes of a SHA-256
_FOLDER = "programs"  # not "xla", where earlier versions keep theirs, which have no sum


def default_folder() -> Path:
    """The folder of $GLM2_JAX_COMPILE_CACHE, or one in the user's cache folder."""
    return user_cache(_FOLDER, VARIABLE) or Path(OFF)


def user_cache(
    name: str, variable: str, chosen: str | os.PathLike[str] | None = None
) -> Path | None:
    """A folder of the user's cache folder, or the one that is `chosen`, here or in an environment
    variable; None where that is "off".

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
    folder: str | os.PathLike | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    warn: Callable[[str], None] | None = None,
) -> Path | None:
    """Keeps compiled programs in `folder`; call it before anything is compiled.

    The folder must be the user's own: programs in it are loaded and run as they are.

    Args:
      folder: None = `default_folder()`; "off" (here or in the variable) = no cache.
      max_bytes: the oldest programs beyond this are deleted first. (The limit that JAX itself has
        needs another package, and a lock that fails on some network file systems.)
      warn: is told in one line why there is no cache, where one was wanted, or what is wrong in it.

    Returns:
      The folder, or None where there is no cache.
    """
    try:
        path = user_cache(_FOLDER, VARIABLE, folder)
        if path is None:
            return None
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        trim(path, max_bytes)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"{path} is not writable")
    except (OSError, RuntimeError, ValueError) as error:  # no home folder; a NUL in the name
        if warn:
            warn(f"warning: no compilation cache, every start compiles anew ({error})")
        return None

    import jax  # late, so that flags can be checked without it

    jax.config.update("jax_compilation_cache_dir", str(path))
    # Small programs count too: the bundled model is made of nothing else.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _mend(path, warn or (lambda line: None))
    _check_programs(warn or (lambda line: None))
    return path


class Lookup:
    """Tells what JAX does for a program that is compiled inside: find it in its cache, or compile.

    JAX tells this to its log alone, and only there before it compiles, which may take minutes.

    Args:
      missed: called once where it is compiled, as a rule before that.

    Attributes:
      found: whether it was in the cache.
    """

    def __init__(self, missed: Callable[[], None]):
        self.found = False
        self._missed, self._told = missed, False
        self._log = logging.getLogger("jax._src.compiler")

    def __enter__(self) -> Lookup:
        import jax

        config: Any = jax.config  # its names are made at run time
        if config.jax_compilation_cache_dir is None or not config.jax_enable_compilation_cache:
            self._tell()
        self._thread = threading.get_ident()
        self._shown, self._level = self._log.getEffectiveLevel(), self._log.level
        self._log.addFilter(self._hear)
        self._log.setLevel(logging.DEBUG)
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        self._log.setLevel(self._level)
        self._log.removeFilter(self._hear)
        if not self.found and kind is None:
            self._tell()

    def _hear(self, record: logging.LogRecord) -> bool:
        """A filter of records, by which those pass that would pass anyway."""
        said = str(record.msg).lower() if record.thread == self._thread else ""
        if said.startswith("persistent compilation cache hit"):
            self.found = True
        elif said.startswith("persistent compilation cache miss"):
            self._tell()
        return record.levelno >= self._shown

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            self._missed()


class _Checked:
    """A cache of JAX in which each program has the sum of its key and its bytes before it.

    JAX takes for a program whatever has its name. Another one may compute something else in
    silence, so what has not the right sum is deleted, and compiled again.

    Args:
      cache: as JAX makes it: `get` and `put` by key.
      warn: is told once in one line that there was such a program.
    """

    def __init__(self, cache: Any, warn: Callable[[str], None]):
        self._path = cache._path
        self._cache, self._warn, self._warned = cache, warn, False

    def get(self, key: str) -> bytes | None:
        """The program, or None where it has to be compiled."""
        path = Path(self._path) / f"{key}-cache"
        plain = path.is_file() or not path.exists()  # a pipe or device may have no end
        data = self._cache.get(key) if plain else b""
        if data is None or data[:_SUM] == _sum(key, data[_SUM:]):
            return None if data is None else data[_SUM:]
        if not self._warned:
            self._warned = True
            self._warn(
                "warning: a program of the compilation cache is damaged, another one, or of an "
                f"earlier version; it is compiled again ({path.parent})"
            )
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program."""
        self._cache.put(key, _sum(key, value) + value)


def _sum(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + value).digest()


def _check_programs(warn: Callable[[str], None]) -> None:
    """Has JAX make its cache a checked one; what is made already stays as it is."""
    from jax._src import compilation_cache as jax_cache  # there is no public place for it

    make = getattr(jax_cache.get_file_cache, "unchecked", jax_cache.get_file_cache)

    def get_file_cache(path: str) -> tuple[Any, str] | None:
        made = make(path)
        return None if made is None else (_Checked(made[0], warn), made[1])

    get_file_cache.unchecked = make  # type: ignore[attr-defined]
    jax_cache.get_file_cache = get_file_cache


def _mend(folder: Path, warn: Callable[[str], None]) -> None:
    """Deletes programs that cannot be read, or were half written; JAX would only complain.

    JAX says it by a warning that has the name of the program, but not of the file: all of that name
    go.
    """
    show = warnings.showwarning

    def showwarning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        pattern = r"Error (reading|writing) persistent compilation cache entry for '(\w+)': (.*)"
        failed = re.match(pattern, str(message))
        if failed is None:
            return show(message, *args, **kwargs)
        warn(f"warning: {failed[1]} a program of the compilation cache failed ({failed[3]})")
        for path in folder.glob(f"{failed[2]}-*-cache"):
            with contextlib.suppress(OSError):
                path.unlink()

    warnings.showwarning = showwarning


def trim(folder: Path, max_bytes: int) -> None:
    """Deletes the oldest entries until those that stay are within `max_bytes`."""
    files = []
    for path in folder.glob("*-cache"):
        try:
            info = path.stat()
        except FileNotFoundError:  # another process trims as well
            continue
        files.append((info.st_mtime, info.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size
