"""XLA in a hurry: for programs of the tests that run a few times, and compile in half the time.

Values differ by roundings at most. To be read before jax is imported.
"""

from importlib.metadata import version
from typing import Any

OPTIONS: dict[str, bool | int] = {"xla_backend_optimization_level": 0}
if version("jaxlib").startswith("0.10."):  # later ones have no other emitter of fusions
    OPTIONS["xla_cpu_use_fusion_emitters"] = False

FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())


def options(platform: str) -> dict[str, Any]:
    """To stand for `glm2_jax.compiler_options`."""
    from glm2_jax import compiler_options

    return compiler_options(platform) | OPTIONS
