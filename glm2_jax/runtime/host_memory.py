"""The memory of this machine, as the operating system reports it. Needs no jax."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 2**60  # cgroup v1 writes a number near 2**63 for "no limit"
# Address space that jax and its libraries map in addition to the memory that they use: measured
# 1.3 GB on Linux with jax 0.10. Without it XLA's compiler ends the process without a message.
_MAPPED = 1_500_000_000


@dataclass(frozen=True)
class Memory:
    """Host memory in bytes; None = unknown.

    `total` and `available` are of the machine, `limit` and `limit_left` of the control groups (a
    container, a batch system), `process_limit` is what `ulimit -v` and `ulimit -d` leave to arrays.
    """

    total: int | None = None
    available: int | None = None
    limit: int | None = None
    limit_left: int | None = None
    process_limit: int | None = None

    @property
    def usable(self) -> int | None:
        """What a new program can have."""
        known = [self.available, self.limit_left, self.process_limit]
        return min((size for size in known if size is not None), default=self.total)


def find_memory(root: Path = Path("/"), *, own: bool = False) -> Memory:
    """Return the host memory and its limits; with `own`, what this process has counts as free."""
    text = read_text(root / "proc/meminfo")
    total, available = (_kilobytes(name, text) for name in ("MemTotal", "MemAvailable"))
    if total is None:
        with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [pair for folder in _memory_groups(root) if (pair := _group_limit(folder))]
    below = [pair for pair in limits if total is None or pair[0] < total]
    taken = _kilobytes("RssAnon", read_text(root / "proc/self/status")) or 0 if own else 0
    return Memory(
        total,
        None if available is None else available + taken,
        limit=min((limit for limit, _ in below), default=None),
        limit_left=min((max(limit - used, 0) + taken for limit, used in below), default=None),
        process_limit=_process_limit(),
    )


def _kilobytes(name: str, text: str) -> int | None:
    """Return the bytes of a line such as "MemTotal:  16000000 kB"; None without such a line."""
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.M)
    return None if match is None else int(match[1]) * 1024


def _process_limit() -> int | None:
    """Return the bytes that `ulimit` leaves to this process; None = no limit."""
    known = []
    with contextlib.suppress(ImportError):  # Windows
        import resource

        for kind, mapped in ((resource.RLIMIT_AS, _MAPPED), (resource.RLIMIT_DATA, 0)):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                known.append(max(limit - mapped, 0))
    return min(known, default=None)


def _memory_groups(root: Path) -> list[Path]:
    """Return the control groups that may limit this process's memory, with all their parents."""
    folders = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0" or "memory" in controllers.split(","):
            base = root / ("sys/fs/cgroup" if number == "0" else "sys/fs/cgroup/memory")
            inside = Path(path.lstrip("/"))  # in a container often one that only the host has
            folders += [base / part for part in (inside, *inside.parents)]
    return list(dict.fromkeys(folders))


def _group_limit(folder: Path) -> tuple[int, int] | None:
    """Return (limit, used without what can be dropped at once) of a control group, in bytes."""
    for limit_file, used_file, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        text = read_text(folder / limit_file).strip()
        if text.isdecimal() and int(text) < _NO_LIMIT:
            used = read_text(folder / used_file).strip()
            match = re.search(rf"^{droppable} (\d+)$", read_text(folder / "memory.stat"), re.M)
            dropped = int(match[1]) if match else 0
            return int(text), max(int(used) - dropped, 0) if used.isdecimal() else 0
    return None


def read_text(path: Path) -> str:
    """Return a small file's text; "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
