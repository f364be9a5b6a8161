"""Where checkpoints may lie: in the file system, or in a bucket of Google Cloud Storage."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from glm2_jax.cli.files import BUCKET
from glm2_jax.errors import GLMError, InputError
from glm2_jax.processes import join

SEEN = ".seen"  # what the first process leaves in a folder for a moment


def absolute(place: str | os.PathLike) -> epath.Path:
    """The place, from whatever folder it is looked at; a bucket is left as it is."""
    text = os.fspath(place)
    return epath.Path(text if text.startswith(BUCKET) else Path(text).absolute())


def free_place(output: str | os.PathLike, checkpoints: str | os.PathLike | None) -> str:
    """The flags of another `--output`, and of other `--checkpoints` if they are given: folders
    with a number behind the names, that are not there yet."""
    number = 2
    while Path(f"{os.fspath(output)}-{number}").exists():
        number += 1
    places = {"output": output} | ({} if checkpoints is None else {"checkpoints": checkpoints})
    return " ".join(
        f"--{flag} {shlex.quote(f'{os.fspath(place)}-{number}')}" for flag, place in places.items()
    )


@contextlib.contextmanager
def using(place: epath.Path) -> Iterator[None]:
    """Turns the many errors of a bucket into InputError; those of files are left alone."""
    try:
        yield
    except Exception as error:
        if isinstance(error, GLMError) or not os.fspath(place).startswith(BUCKET):
            raise
        raise InputError(
            f"{place} cannot be used",
            (str(error).splitlines() or [type(error).__name__])[0][:300],
            "Install the extra gcs, log in (gcloud auth application-default login), or look at "
            "the rights and the name of the bucket.",
        ) from error


def check_shared(place: epath.Path) -> None:
    """Refuses a place that is not one and the same for all processes of the run.

    Raises:
        InputError: in all of them.
    """
    if not join.are_several():
        return
    token = place / SEEN
    if join.is_first():
        place.mkdir(parents=True, exist_ok=True)
        token.write_text("")
    join.highest(0)  # now it is there
    blind = join.highest(int(not token.exists()))
    if join.is_first():
        token.unlink()
    if blind:
        raise InputError(
            f"not all processes see {place} of the first one",
            "Each of them saves its part of a checkpoint there.",
            "Name a folder that the hosts share, or a bucket: --checkpoints gs://BUCKET/PATH.",
        )
