"""Reference data that may be next to the checkout; tests that need it skip if it is not."""

from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDER = ROOT.parent / "shared" / "data"


def shared_path(name: str) -> Path:
    """The path of a reference file, or a skip that says which one is missing."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"no reference data: ../shared/data/{name}")
    return path


def shared_file(name: str, *, missing_ok: bool = False) -> bytes | None:
    """The bytes of a reference file; None for a missing one if the folder itself is there."""
    if missing_ok and FOLDER.exists() and not (FOLDER / name).exists():
        return None
    return shared_path(name).read_bytes()
