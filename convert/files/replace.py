"""Replaces small files of a folder, each atomically."""

import os
from collections.abc import Mapping
from pathlib import Path

from convert.files.safetensors_writer import write_file
from glm2_jax.cli.files import fsync, refuse_url
from glm2_jax.errors import InputError


def replace_files(
    folder: str | os.PathLike, files: Mapping[str, bytes], *, what: str, first_removed: str = ""
) -> None:
    """Write files into a folder, which is made if it is missing; others in it stay.

    All are written under temporary names first, so that each is old or new, never half. The file
    `first_removed`, which belongs to the others, is missing in between. UsageError for a URL;
    InputError, which calls them `what`, where the folder cannot be written.
    """
    refuse_url(folder)
    folder = Path(folder)
    new = {name: folder / f".{name}.new" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in new.items():
            path.unlink(missing_ok=True)
            write_file(path, files[name])
        if first_removed:
            (folder / first_removed).unlink(missing_ok=True)
        for name, path in new.items():
            path.replace(folder / name)
        fsync(folder)
    except OSError as error:
        raise InputError(
            f"The {what} cannot be written to {folder}: {error.strerror or error}.",
            fix="Free some space, or check the path and its permissions.",
        ) from error
