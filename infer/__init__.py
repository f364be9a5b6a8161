"""Answering with a checkpoint of the GLM family: sampling, the engine, and the command-line tools.

Names are imported when they are first used, so that `--help` does not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from glm2_jax.extras import require_packages

if TYPE_CHECKING:
    from infer.engine.answer import Completion
    from infer.engine.engine import Engine
    from infer.engine.load import load
    from infer.engine.params import SamplingParams

__all__ = ["Completion", "Engine", "SamplingParams", "load"]

_MODULES = {
    "Completion": "engine.answer",
    "Engine": "engine.engine",
    "SamplingParams": "engine.params",
    "load": "engine.load",
}

require_packages()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"infer.{_MODULES[name]}"), name)
