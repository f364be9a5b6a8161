"""Checkpoint folders in and out: official and HF-native ones and our own, read and written.

Names are imported when they are first used, so that `--help` does not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.files.manifest import verify_checkpoint
    from convert.loading.checkpoint import Checkpoint, CheckpointSummary, load_checkpoint
    from convert.loading.folder import open_folder
    from convert.writing.gguf import export_gguf
    from convert.writing.own import save_checkpoint
    from convert.writing.pytorch import export_folder

__all__ = [
    "Checkpoint",
    "CheckpointSummary",
    "export_folder",
    "export_gguf",
    "load_checkpoint",
    "open_folder",
    "save_checkpoint",
    "verify_checkpoint",
]

_MODULES = {
    "Checkpoint": "loading.checkpoint",
    "CheckpointSummary": "loading.checkpoint",
    "export_folder": "writing.pytorch",
    "export_gguf": "writing.gguf",
    "load_checkpoint": "loading.checkpoint",
    "open_folder": "loading.folder",
    "save_checkpoint": "writing.own",
    "verify_checkpoint": "files.manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"convert.{_MODULES[name]}"), name)
