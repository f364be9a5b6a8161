"""Runs a script of checks on eight virtual CPU devices, in a process of its own.

JAX takes the number of its devices once, so a test process that has one device keeps one.
"""

import json
import os
import subprocess
import sys
from typing import Any

from tests.support.paths import ROOT

DEVICES = 8


def run(module: str, *args: str, timeout: int = 600) -> Any:
    """What `python -m MODULE ARGS` prints as JSON on its last line, where JAX sees 8 devices."""
    known = os.environ.get("XLA_FLAGS", "")
    flags = f"{known} --xla_force_host_platform_device_count={DEVICES}"
    # XLA:CPU runs the devices on a pool of threads, where those that wait in two collectives of a
    # program at once can keep the others from theirs for ever: there are more threads than that.
    threads = {"NPROC": str(4 * DEVICES)}
    env = {**os.environ, **threads, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    command = [sys.executable, "-W", "error", "-m", module, *args]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # What XLA says where it finds no way to cut an array but to copy all of it to every device.
    assert "Involuntary full rematerialization" not in done.stderr, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
