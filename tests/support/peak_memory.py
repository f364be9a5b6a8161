"""Runs a command and prints its time and its peak of anonymous memory, for the page of benchmarks.

    python -m tests.support.peak_memory python -m infer.generate --model FOLDER --prompt 你好

Anonymous memory (RssAnon) leaves out the mapped pages of files, which the system takes back when
it needs them. The kernel keeps no high-water mark of it, so it is sampled every 5 ms.
"""

import subprocess
import sys
import time
from pathlib import Path


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    lines = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return next((int(line.split()[1]) * 1024 for line in lines), 0)


def main() -> int:
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(sys.argv[1:])
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    print(f"{seconds:.1f} s, peak anonymous memory {peak / 1e9:.3f} GB", file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
