"""The persistent compilation cache: a program that was compiled once starts at once the next time.

The command-line tools choose its folder. `infer.load` is a guest in its user's process: settings of
JAX that are made there already stay as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "GLM2_JAX_COMPILE_CACHE"
OFF = "off"
MAX_BYTES = 2 * 1024**3
_FOLDER = "programs"  # not "xla", where earlier versions kept programs without checksums


def user_cache(
    name: str = _FOLDER, variable: str = VARIABLE, chosen: str | os.PathLike[str] | None = None
) -> Path | None:
    """Return the chosen folder, or that of the environment variable, or `name` in the user's cache.

    None if it is "off"; raises RuntimeError if there is no home folder.
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
) -> None:
    """Keep compiled programs in `folder`; call it before anything is compiled.

    None is the default of `user_cache`, "off" no cache. The folder must belong to the user:
    programs in it are loaded and run as they are. `warn` gets one line if it, or something in it,
    is unusable.
    """
    try:
        path = user_cache(chosen=folder)
        if path is None:
            return
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        trim(path, MAX_BYTES)  # JAX's own limit takes a lock that fails on some network disks
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"{path} is not writable")
    except (OSError, RuntimeError, ValueError) as error:  # no home folder; a NUL in the name
        warn(f"warning: no compilation cache, every start compiles again ({error})")
        return

    import jax  # late, so that flags can be checked without it
    from jax._src import compilation_cache as jax_cache  # there is no public place for it

    jax.config.update("jax_compilation_cache_dir", str(path))
    # Small programs count too: the bundled model consists of nothing else.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    make = getattr(jax_cache.get_file_cache, "unchecked", jax_cache.get_file_cache)

    def get_file_cache(path: str) -> tuple[Any, str] | None:
        made = make(path)
        return None if made is None else (_Checked(made[0], warn), made[1])

    get_file_cache.unchecked = make  # type: ignore[attr-defined]
    jax_cache.get_file_cache = get_file_cache


def enable_unless_set(
    folder: str | os.PathLike | None = None, *, warn: Callable[[str], None] = lambda line: None
) -> None:
    """Do what `enable_compile_cache` does, unless JAX has a cache already, or is to have none.

    That is known from `jax_compilation_cache_dir` and `jax_enable_compilation_cache`, options or
    environment variables of JAX. A `folder`, or "off", is an explicit choice and goes before them.
    """
    import jax

    config: Any = jax.config  # its attributes are made at run time
    is_set = config.jax_compilation_cache_dir is not None
    if folder is not None or (config.jax_enable_compilation_cache and not is_set):
        enable_compile_cache(folder, warn=warn)


class Lookup(logging.Filter):
    """A context in which one program is compiled; `found` says whether it was in JAX's cache.

    `missed` is called once if it is not, as a rule before it is compiled. That may take minutes,
    and before it JAX reports a miss only in its log. One thread at a time may use this.
    """

    def __init__(self, missed: Callable[[], None]):
        super().__init__()
        self.found, self._missed = False, missed
        self._log = logging.getLogger("jax._src.compiler")

    def __enter__(self) -> Lookup:
        import jax

        config: Any = jax.config  # its attributes are made at run time
        if config.jax_compilation_cache_dir is None or not config.jax_enable_compilation_cache:
            self._miss()
        self._thread = threading.get_ident()
        self._shown, self._level = self._log.getEffectiveLevel(), self._log.level
        self._log.addFilter(self)
        self._log.setLevel(logging.DEBUG)
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        self._log.setLevel(self._level)
        self._log.removeFilter(self)
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
    """A cache of JAX in which each program follows a SHA-256 of its key and its bytes.

    JAX runs whatever has a program's name, and another program of the same shapes would compute
    wrong numbers without an error. An entry with a wrong checksum is deleted and compiled again;
    `warn` is called once with one line.
    """

    def __init__(self, cache: Any, warn: Callable[[str], None]):
        self._cache, self._warn = cache, warn
        self._path = cache._path  # JAX reads this name when it resets its cache

    def get(self, key: str) -> bytes | None:
        """Return the program, or None if it has to be compiled."""
        path = Path(self._path) / f"{key}-cache"
        try:
            plain = path.is_file() or not path.exists()  # a pipe or device may have no end
            data = self._cache.get(key) if plain else b""
            if data is None or data[:32] == _sum(key, data[32:]):
                return None if data is None else data[32:]
            self._discard(path, "damaged, replaced, or of an earlier version")
        except (OSError, ValueError) as error:
            self._discard(path, error)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keep a program."""
        try:
            self._cache.put(key, _sum(key, value) + value)
        except (OSError, ValueError) as error:
            self._discard(Path(self._path) / f"{key}-cache", error)

    def _discard(self, path: Path, why: object) -> None:
        warn, self._warn = self._warn, lambda line: None
        warn(
            f"warning: a program of the compilation cache is unusable: {why}; it is "
            f"compiled again ({path.parent})"
        )
        with contextlib.suppress(OSError):
            path.unlink()


def _sum(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + value).digest()


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
