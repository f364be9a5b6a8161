"""Where checkpoints are stored: in the file system, or in a bucket of Google Cloud Storage."""

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

SEEN = ".seen"  # the first process makes it in a folder for a moment


def absolute(place: str | os.PathLike) -> epath.Path:
    """Return the absolute path of a place; a bucket is left as it is."""
    text = os.fspath(place)
    return epath.Path(text if text.startswith(BUCKET) else Path(text).absolute())


def free_place(output: str | os.PathLike, checkpoints: str | os.PathLike | None) -> str:
    """Return flags that name another `--output`, and other `--checkpoints` if they are given:
    the same names with the first number that is free."""
    number = 2
    while Path(f"{os.fspath(output)}-{number}").exists():
        number += 1
    places = {"output": output} | ({} if checkpoints is None else {"checkpoints": checkpoints})
    return " ".join(
        f"--{flag} {shlex.quote(f'{os.fspath(place)}-{number}')}" for flag, place in places.items()
    )


@contextlib.contextmanager
def using(place: epath.Path) -> Iterator[None]:
    """Turn the many errors of a bucket into InputError; those of files are left alone."""
    try:
        yield
    except Exception as error:
        if isinstance(error, GLMError) or not os.fspath(place).startswith(BUCKET):
            raise
        raise InputError(
            f"{place} cannot be used",
            (str(error).splitlines() or [type(error).__name__])[0][:300],
            "Install the extra gcs, log in (gcloud auth application-default login), or check the "
            "permissions and the name of the bucket.",
        ) from error


def check_shared(place: epath.Path) -> None:
    """Refuse a place that is not the same for all processes: InputError in all of them."""
    if not join.are_several():
        return
    token = place / SEEN
    if join.is_first():
        place.mkdir(parents=True, exist_ok=True)
        token.write_text("")
    join.highest(0)  # a barrier: now the file exists
    blind = join.highest(int(not token.exists()))
    if join.is_first():
        token.unlink()
    if blind:
        raise InputError(
            f"{place} is not the same folder for all processes",
            "Each process saves its part of a checkpoint there.",
            "Name a folder that the hosts share, or a bucket: --checkpoints gs://BUCKET/PATH.",
        )
