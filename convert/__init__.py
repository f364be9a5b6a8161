"""Checkpoint folders in and out: official and HF-native ones and our own, read and written.

Names are imported when they are first used, so that `--help` does not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from glm2_jax.extras import require_packages

if TYPE_CHECKING:  # "as": a public name of this package
    from convert.files.manifest import verify_checkpoint as verify_checkpoint
    from convert.loading.checkpoint import Checkpoint as Checkpoint
    from convert.loading.checkpoint import CheckpointSummary as CheckpointSummary
    from convert.loading.checkpoint import load_checkpoint as load_checkpoint
    from convert.loading.folder import open_folder as open_folder
    from convert.writing.gguf import export_gguf as export_gguf
    from convert.writing.own import save_checkpoint as save_checkpoint
    from convert.writing.pytorch import export_folder as export_folder

# Module -> the public names that it defines.
_MODULES = {
    "files.manifest": "verify_checkpoint",
    "loading.checkpoint": "Checkpoint CheckpointSummary load_checkpoint",
    "loading.folder": "open_folder",
    "writing.gguf": "export_gguf",
    "writing.own": "save_checkpoint",
    "writing.pytorch": "export_folder",
}

require_packages()


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"convert.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
