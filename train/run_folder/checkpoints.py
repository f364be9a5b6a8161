"""What a training needs to go on, saved by Orbax: complete or not there at all."""

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
from train.run_folder.storage import absolute, using


class Checkpoints:
    """The checkpoints of one run, by the number of steps taken. A context manager.

    Saving copies the arrays and goes on in the background; leaving waits for it.

    Args:
        folder: made if it is not there; also of object storage, see `train.run_folder.storage`.
        keep: how many of the newest stay.
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
        """Steps taken at the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Saves after `step` steps.

        Args:
            state: pytree of arrays.
            position: JSON values that belong to it.

        Raises:
            InputError: it, or the one before it, could not be written; those before stay.
        """
        with self._errors("written"):
            self._manager.wait_until_finished()
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
            )
            self._manager.save(step, args=items, force=True)

    def finish(self) -> None:
        """Waits until what was saved is on the disk. Raises as `save` does."""
        with self._errors("written"):
            self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the position saved after `step` steps.

        Args:
            like: a state of the same structure, whose shapes, types and devices count.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another structure.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # Orbax raises that very class, too, where data are cut
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"the checkpoint {self.folder / str(step)} cannot be read",
                _reason(error),
                f"Remove it, then --resume auto {self._goes_on(but=step)}.",
            ) from error
        return found["state"], found["position"]

    def _goes_on(self, but: int | None = None) -> str:
        """What a run does next, by the checkpoints that are whole: the others have other names."""
        try:
            steps = [int(x.name) for x in self.folder.iterdir() if x.name.isdecimal()]
        except OSError:
            steps = []
        newest = max((step for step in steps if step != but), default=None)
        return "begins anew" if newest is None else f"goes on after step {newest}"

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """Orbax and TensorStore raise several kinds for a full disk or a folder without rights."""
        try:
            with using(self.folder):
                yield
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the checkpoints in {self.folder} cannot be {done}",
                _reason(error),
                f"Free some space, or check the rights; then --resume auto {self._goes_on()}.",
            ) from error


def _reason(error: BaseException) -> str:
    """The first cause: of TensorStore's 'CODE: outer "path": ... "path": inner [x=..]' the last."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    if re.match("[A-Z_]+: ", text):
        text = re.sub(r" \[\w+(\[\d+\])?='.*", "", text).rpartition('": ')[2]
    return text[:300]


@functools.cache
def _quieten() -> None:
    """What Orbax's threads say of a failure stays unsaid from here on: it is raised as well.

    Some of it comes when what they left is collected, or from TensorStore's own threads, which
    may be long after; so this stays. All that is not theirs is passed on.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_of_orbax)
    warnings.filterwarnings("ignore", "coroutine '_read_array.* was never awaited", RuntimeWarning)
    tell = sys.unraisablehook

    def hear(unraised: sys.UnraisableHookArgs) -> None:
        code = getattr(unraised.object, "cr_code", None)  # of a coroutine
        late = unraised.object is None and str(unraised.exc_value) == "Event loop is closed"
        if not late and "orbax" not in getattr(code, "co_filename", ""):
            tell(unraised)

    sys.unraisablehook = hear


def _not_of_orbax(record: logging.LogRecord) -> bool:
    lost = record.name == "asyncio" and "never retrieved" in record.getMessage()
    return not lost and "orbax" not in record.pathname
