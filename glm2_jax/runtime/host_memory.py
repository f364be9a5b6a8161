"""What the operating system says of this machine's memory. Needs no jax."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 2**60  # cgroup v1 writes a number near 2**63 where there is no limit
# Address space that jax and its libraries map beside the memory that they use: measured 1.3 GB on
# Linux with jax 0.10. Where it is missing, XLA's compiler ends the process without a word.
_MAPPED = 1_500_000_000


@dataclass(frozen=True)
class Memory:
    """Host memory in bytes; None where the system does not say.

    Attributes:
      total, available: of the machine.
      limit, limit_left: what the control groups (a container, a batch system) leave of it.
      process_limit: what the process's own limits (`ulimit -v`, `ulimit -d`) leave to arrays.
    """

    total: int | None = None
    available: int | None = None
    limit: int | None = None
    limit_left: int | None = None
    process_limit: int | None = None

    @property
    def usable(self) -> int | None:
        """What a new program can have."""
        told = (self.available, self.limit_left, self.process_limit)
        known = [n for n in told if n is not None]
        return min(known) if known else self.total


def find_memory(root: Path = Path("/"), *, own: bool = False) -> Memory:
    """Host memory, and what the control groups leave of it.

    Args:
      own: count as free what this process has already taken, for it to start anew.
    """
    text = read_text(root / "proc/meminfo")
    total, available = (
        int(match[1]) * 1024 if (match := re.search(rf"^{name}:\s+(\d+) kB", text, re.M)) else None
        for name in ("MemTotal", "MemAvailable")
    )
    if total is None:
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):  # Windows has no such thing
            pass
    limits = [pair for folder in _memory_groups(root) if (pair := _group_limit(folder))]
    below = [pair for pair in limits if total is None or pair[0] < total]
    taken = _resident(root) if own else 0
    return Memory(
        total,
        None if available is None else available + taken,
        limit=min((limit for limit, _ in below), default=None),
        limit_left=min((max(limit - used, 0) + taken for limit, used in below), default=None),
        process_limit=_process_limit(),
    )


def _resident(root: Path) -> int:
    """Bytes of memory that this process has; 0 where the system does not say."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", read_text(root / "proc/self/status"), re.M)
    return 0 if match is None else int(match[1]) * 1024


def _process_limit() -> int | None:
    """Bytes that `ulimit` leaves to this process; None = it limits nothing."""
    known = []
    with contextlib.suppress(ImportError):  # Windows
        import resource

        for kind, mapped in ((resource.RLIMIT_AS, _MAPPED), (resource.RLIMIT_DATA, 0)):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                known.append(max(limit - mapped, 0))
    return min(known, default=None)


def _memory_groups(root: Path) -> list[Path]:
    """The control groups of this process that may limit memory, with all their parents."""
    folders = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0":
            base = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
        else:
            continue
        inside = Path(path.lstrip("/"))  # in a container often a path that only the host knows
        folders += [base / part for part in (inside, *inside.parents)]
    return list(dict.fromkeys(folders))


def _group_limit(folder: Path) -> tuple[int, int] | None:
    """(limit, used without what can be dropped at once) of a control group, bytes."""
    for limit_file, used_file, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        text = read_text(folder / limit_file).strip()
        if not text.isdecimal() or int(text) >= _NO_LIMIT:
            continue
        used = read_text(folder / used_file).strip()
        match = re.search(rf"^{droppable} (\d+)$", read_text(folder / "memory.stat"), re.M)
        dropped = int(match[1]) if match else 0
        return int(text), max(int(used) - dropped, 0) if used.isdecimal() else 0
    return None


def read_text(path: Path) -> str:
    """A small file's text; "" where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
