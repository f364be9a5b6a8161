"""Checkpoints of a training, saved by Orbax: complete or absent."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from glm2_jax.cli.main import is_out_of_memory
from glm2_jax.errors import CheckpointError, InputError
from train.run_folder.folder import absolute, using


class Checkpoints:
    """The newest `keep` checkpoints of a run, by the number of steps taken. A context manager.

    Saving copies the arrays and writes in the background; leaving the context waits for it. An
    InputError says what could not be written; older checkpoints stay.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int):
        self.folder = absolute(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        _quieten()
        with self._errors("opened"):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._errors("written"):
            self._manager.close()

    @property
    def newest(self) -> int | None:
        """The number of steps of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Save a pytree of arrays after `step` steps, and JSON values that belong to it."""
        self.finish()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
        )
        with self._errors("written"):
            self._manager.save(step, args=items, force=True)

    def finish(self) -> None:
        """Wait until the saved checkpoints are on the disk."""
        with self._errors("written"):
            self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return the state and the position saved after `step` steps.

        `like` is a state of the same structure, which gives shapes, dtypes and devices. Raises
        CheckpointError if the checkpoint is damaged, or of another structure.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax raises `Exception` itself where data are cut
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"the checkpoint {self.folder / str(step)} cannot be read",
                _reason(error),
                f"Remove it, then --resume auto {self._next_run(but=step)}.",
            ) from error
        return found["state"], found["position"]

    def _next_run(self, but: int | None = None) -> str:
        """Return what the next run will do; only complete checkpoints are named by a number."""
        try:
            steps = [int(x.name) for x in self.folder.iterdir() if x.name.isdecimal()]
        except OSError:
            steps = []
        newest = max((step for step in steps if step != but), default=None)
        return "starts over" if newest is None else f"resumes after step {newest}"

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """Turn errors of Orbax and TensorStore into ours: a full disk, missing permissions."""
        try:
            with using(self.folder):
                yield
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the checkpoints in {self.folder} cannot be {done}",
                _reason(error),
                f"Free some space or check permissions; then --resume auto {self._next_run()}.",
            ) from error


def _reason(error: BaseException) -> str:
    """Return the first cause; of TensorStore's 'CODE: outer "path": inner [x=..]' the inner one."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    if re.match("[A-Z_]+: ", text):
        text = re.sub(r" \[\w+(\[\d+\])?='.*", "", text).rpartition('": ')[2]
    return text[:300]


@functools.cache
def _quieten() -> None:
    """Hide what Orbax's threads print about a failure, which is raised as well.

    Some of it comes with garbage collection or from TensorStore's threads, perhaps much later, so
    this is never undone. Messages of others are passed on.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_of_orbax)
    warnings.filterwarnings("ignore", "coroutine '_read_array.* was never awaited", RuntimeWarning)
    print_unraised = sys.unraisablehook

    def hook(unraised: sys.UnraisableHookArgs) -> None:
        code = getattr(unraised.object, "cr_code", None)  # of a coroutine
        late = unraised.object is None and str(unraised.exc_value) == "Event loop is closed"
        if not late and "orbax" not in getattr(code, "co_filename", ""):
            print_unraised(unraised)

    sys.unraisablehook = hook


def _not_of_orbax(record: logging.LogRecord) -> bool:
    lost = record.name == "asyncio" and "never retrieved" in record.getMessage()
    return not lost and "orbax" not in record.pathname
