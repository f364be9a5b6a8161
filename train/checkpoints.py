"""What a training needs to go on, saved by Orbax: complete or not there at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from glm2_jax.errors import CheckpointError, InputError


class Checkpoints:
    """The checkpoints of one run, by the number of steps taken. A context manager.

    Saving copies the arrays and goes on in the background; leaving waits for it.

    Args:
        folder: made if it is not there.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, *, keep: int):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
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
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint {self.folder / str(step)} cannot be read",
                " ".join(str(error).split())[:300],
                "Remove it to go on from the one before it.",
            ) from error
        return found["state"], found["position"]

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """Orbax and TensorStore raise several kinds for a full disk or a folder without rights."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the checkpoints in {self.folder} cannot be {done}",
                " ".join(str(error).split())[:300],
                "The last complete one stays: mend it, then go on with --resume auto.",
            ) from error
