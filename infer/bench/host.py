"""The machine that a benchmark runs on, found without jax."""

import os

from glm2_jax.cli.messages import human_size
from glm2_jax.runtime.host_memory import find_memory
from glm2_jax.runtime.machine import cores, load_average, processor


def describe_host() -> str:
    """Return the processor, its cores and the memory, for reports."""
    memory = find_memory().total
    return f"{processor()}, {cores()} cores" + (f", {human_size(memory)}" if memory else "")


def load_text() -> str:
    """Return the load of this machine in the last minute."""
    return f"{load_average():.1f}" if hasattr(os, "getloadavg") else "unknown"
