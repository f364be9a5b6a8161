"""The peak memory use."""

import sys
from typing import Any


def reset_peak() -> None:
    """Start counting again, on the host: Linux can; elsewhere the peak is since the start."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_bytes(device: Any) -> int | None:
    """Return the most memory used so far, on the device where it reports that; on a CPU by this
    process."""
    found = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return host_peak() if found is None and device.platform == "cpu" else found


def host_peak() -> int:
    """Return the most memory that this process has used."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
