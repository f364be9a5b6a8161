"""Several trials at once: a process for each GPU, which share the study. Imports no jax."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from glm2_jax.cli import interrupt
from glm2_jax.cli.main import EXIT_DEVICE
from glm2_jax.cli.messages import note
from glm2_jax.errors import UsageError
from glm2_jax.processes.supervise import Worker, pass_signals_on
from glm2_jax.runtime.machine import find_nvidia

_GPUS, _PLATFORMS, _PATH = "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "PYTHONPATH"


def find_gpus(jobs: int, device: str) -> list[str]:
    """Return the name of a GPU for each job; UsageError where there are too few."""
    given = os.environ.get(_GPUS)
    found = [str(number) for number in range(len(find_nvidia().gpus))]
    if found and given is not None:
        found = [name for name in given.split(",") if name]
    found = found if device in ("auto", "gpu") else []
    if len(found) < jobs:
        raise UsageError(
            f"--jobs {jobs} needs {jobs} GPUs, and {len(found)} can be used here.",
            "Trials on one device would share its memory and its time. Several TPUs are not "
            "supported.",
            "Leave it out, or choose fewer.",
        )
    return found[:jobs]


def run_jobs(words: Sequence[str], gpus: Sequence[str]) -> int:
    """Run the command once for each GPU, until all have ended; return 0, or an exit code that is
    not. They end with this process."""
    over: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get(_PATH)])]
    # What this process computes on is not what they do.
    common = {_PLATFORMS: "", _PATH: os.pathsep.join(path)}
    command = [sys.executable, "-P", "-m", "train.sweep", *words, "--resume=auto"]
    workers = [
        Worker(
            [*command, f"--job={number}"],
            over,
            prefix=f"job {number}: ",
            environment={**common, _GPUS: gpu},
            stdin=subprocess.DEVNULL,
        )
        for number, gpu in enumerate(gpus)
    ]
    came = pass_signals_on(workers)
    codes = []
    for _ in workers:
        worker = over.get()
        codes.append(worker.exit_code)
        if worker.exit_code < 0 and not came:  # it could not report why
            name = signal.Signals(-worker.exit_code).name
            note(f"job {workers.index(worker)} was terminated by {name}; --resume auto continues")
    if came:
        interrupt.tell(interrupt.exit_code(came[0]))
        return interrupt.exit_code(came[0])
    return next((code if code > 0 else EXIT_DEVICE for code in codes if code), 0)
