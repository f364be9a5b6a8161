"""Paths of the file system. Everything but the checkpoints of training lies there: other places are
refused."""

import os
import re
from pathlib import Path

from glm2_jax.errors import InputError, UsageError

# Also what is left of the two slashes in a `Path`. A single letter is a drive of Windows.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_DOWNLOAD = "Download it first; a model on a hub is OWNER/NAME with --source hf or modelscope."
_FIXES = {
    "gs": "Copy it first (gcloud storage cp -r), or mount the bucket (gcsfuse).",
    "s3": "Copy it first (aws s3 cp --recursive), or mount the bucket (mount-s3).",
    "file": "Leave file:// out.",
    "http": _DOWNLOAD,
    "https": _DOWNLOAD,
}


def refuse_url(path: str | os.PathLike) -> None:
    """Refuses gs://, s3://, https:// and their like, and what no file system can have as a name.

    Raises:
        UsageError: such a path; what to do instead is said.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise UsageError(f"{text[:500]} is not a path.", "It holds a NUL character.", "Remove it.")
    found = _URL.match(text)
    if found is not None:
        raise UsageError(
            f"{text[:500]} is not a path of the file system.",
            "Files are read and written there alone, not in other storage or over the network.",
            _FIXES.get(found[1].lower(), "Copy it first."),
        )


def real_path(path: str | os.PathLike) -> Path:
    """Return the path without links in it; what is missing at its end stays as it is.

    Raises:
        UsageError: no path, as in `refuse_url`. InputError: links that lead back to themselves.
    """
    refuse_url(path)
    real = Path(os.path.realpath(path))
    if os.path.islink(real):  # not `real.is_symlink`, which raises where a name is too long
        raise InputError(
            f"{os.fspath(path)} cannot be opened.",
            "It is a symbolic link that leads back to itself.",
            "Remove the link, or choose another name.",
        )
    return real
