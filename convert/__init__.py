"""Checkpoint folders in and out: official and HF-native ones and our own, read and written.

Names are imported when they are first used, so that `--help` does not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.export import export_folder
    from convert.folder import open_folder
    from convert.gguf_export import export_gguf
    from convert.loader import Checkpoint, CheckpointSummary, load_checkpoint
    from convert.manifest import verify_checkpoint
    from convert.own_format import save_checkpoint

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
    "Checkpoint": "loader",
    "CheckpointSummary": "loader",
    "export_folder": "export",
    "export_gguf": "gguf_export",
    "load_checkpoint": "loader",
    "open_folder": "folder",
    "save_checkpoint": "own_format",
    "verify_checkpoint": "manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"convert.{_MODULES[name]}"), name)
