"""Where a checkpoint folder or file may be written, and what it may replace."""

import os
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from convert.files.manifest import MANIFEST, read_manifest
from convert.files.tensor import reading
from glm2_jax.cli.files import current, new_output, real_path, require_space, require_writable
from glm2_jax.errors import CheckpointError, UsageError

# Room for headers, the index, the manifest and the blocks of the file system.
_SPARE_BYTES = 2**20


def check_destination(
    destination: str | Path,
    overwrite: bool | None = None,
    *,
    source: Path | None = None,
    needed: int = 0,
    file: bool = False,
) -> None:
    """Refuse to begin what cannot be finished, and to replace what must not be replaced.

    Args:
        destination: the folder to write; with `file`, a single file.
        overwrite: whether a folder of this project's format may be replaced; None = the command has
            no flag for it.
        source: the folder that is converted.
        needed: bytes to write.

    Raises:
        UsageError: a URL; or the folder exists and `overwrite` is not True, or it is not of this
            project's format, or it holds the source or files that were not written by it.
        InputError: no space, or the folder cannot be written.
    """
    if file and (os.fspath(destination).endswith(os.sep) or os.path.isdir(destination)):
        raise UsageError(
            f"{destination} is a folder.",
            "The output is a single file.",
            f"Name the file, for example {Path(destination) / 'model.gguf'}.",
        )
    path = real_path(destination)
    require_writable(path)
    _check_replaceable(path, current(path), overwrite, source)
    require_space(path, needed + _SPARE_BYTES)


def new_destination(
    destination: str | Path,
    *,
    needed: int,
    overwrite: bool | None = None,
    source: Path | None = None,
    file: bool = False,
) -> AbstractContextManager[Path]:
    """Give a temporary path that becomes `destination`, complete or not at all.

    Arguments and errors are those of `check_destination`; another process that writes the same
    folder, and an error of the system while it is filled, are an InputError, too.
    """
    if file:
        check_destination(destination, overwrite, needed=needed, file=True)
    path = real_path(destination)
    check = partial(_check_replaceable, path, path, overwrite, source)
    return new_output(path, check, needed=needed + _SPARE_BYTES, folder=not file)


def _check_replaceable(
    folder: Path, present: Path, overwrite: bool | None, source: Path | None
) -> None:
    if not os.path.lexists(present):
        return
    if present.is_dir() and present.samefile("."):
        raise UsageError(
            f"{folder} is the current folder.",
            "The command replaces the folder, so you would stay in a removed one.",
            "Run the command somewhere else.",
        )
    if source is not None and present.is_dir():
        with reading(source):
            _check_outside(present, source)
    try:
        if present.is_dir() and not any(present.iterdir()):
            return
        if not overwrite:
            asking = "" if overwrite is None else ", or use --overwrite (overwrite=True)"
            raise UsageError(
                f"{folder} exists.", "Nothing is overwritten.", f"Choose another name{asking}."
            )
        known = {MANIFEST, *read_manifest(present).files}
        foreign = [
            path.name
            for path in sorted(present.iterdir())
            if path.name not in known or (path.is_dir() and not path.is_symlink())
        ]
    except (CheckpointError, OSError) as error:
        raise UsageError(
            f"{folder} is not a folder of this project's format.",
            "Only such a folder is replaced, so that a mistyped path does no harm.",
            "Choose another name, or remove it yourself.",
        ) from error
    if foreign:
        raise UsageError(
            f"{folder} holds {', '.join(foreign[:5])}{', ...' if foreign[5:] else ''}.",
            "Its manifest does not list that, so replacing the folder would lose it.",
            "Move it elsewhere, or choose another name.",
        )


def _check_outside(folder: Path, source: Path) -> None:
    """Refuse to replace a folder that is or holds the source, or a file that it links to."""
    for path in (source, *source.iterdir()):
        real = real_path(path)
        if any(place.exists() and place.samefile(folder) for place in (real, *real.parents)):
            raise UsageError(
                f"{folder} holds the source {path}.",
                "It is read until the new folder is complete, and replacing it would lose it.",
                "Choose another name.",
            )
