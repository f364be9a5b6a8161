"""The folder of a run: its lock, what it was made from, and what lies in it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.cli import note
from glm2_jax.errors import InputError, UsageError
from infer.text_input import read_utf8
from train.settings import write_recipe

_RECIPE, _LOG, _STATE, _BEST = "recipe.yml", "log.jsonl", "state", "best"
_IDENTITY, _NEW, _LOCK = "run.json", "run.json.new", ".lock"


class RunFolder:
    """The output folder of one run, locked as long as it is open. A context manager.

    Args:
        path: made if it is not there.
        resume: "auto" goes on with the run that is there, if any; "none" wants none.
        identity: what the result depends on, as JSON values: name -> value.
        writes: whether this process is the one that writes it; the others of a run are only told
            the names in it, and nothing is raised there.

    Raises:
        UsageError: the folder holds a run and `resume` is "none", or its run was made from
            something else, or it holds other things.
        InputError: another process is at it, or it cannot be written.
    """

    def __init__(
        self, path: str | Path, *, resume: str, identity: Mapping[str, Any], writes: bool = True
    ):
        self.path, self._lock = Path(path), None
        self._identity = json.loads(json.dumps(identity))  # as it is read back
        if not writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"{self.path} cannot be written", reason, "Name another --output."
            ) from error
        try:
            self._take_lock(self._lock)
            self._check(resume, self._identity)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """From here on the folder is that of this run, of which `recipe` are the flags."""
        if self._lock is None:
            return
        write_recipe(self._file(_RECIPE), recipe)
        text = json.dumps(self._identity, indent=1, ensure_ascii=False)
        self._file(_NEW).write_text(text, encoding="utf-8")
        self._file(_NEW).replace(self._file(_IDENTITY))

    @property
    def state(self) -> Path:
        """Where the checkpoints of the training are."""
        return self._file(_STATE)

    @property
    def best(self) -> Path:
        """Where the best of what was evaluated is, for runs that may end early."""
        return self._file(_BEST)

    @property
    def log(self) -> Path:
        """Where its log is, if no other place was named."""
        return self._file(_LOG)

    def _file(self, name: str) -> Path:
        return self.path / name

    def _take_lock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another training writes {self.path}",
                f"It holds the lock of {_LOCK} there.",
                "Wait for it, or name another --output.",
            ) from None
        except OSError:
            note(f"warning: {self.path} has no locks; start no second run with this --output")

    def _check(self, resume: str, identity: Mapping[str, Any]) -> None:
        present = self._file(_IDENTITY)
        if not present.exists():
            others = sorted({path.name for path in self.path.iterdir()} - {_LOCK, _NEW, _RECIPE})
            if others:
                raise UsageError(
                    f"{self.path} holds {', '.join(others[:5])}, and no run of this command",
                    "A training does not write among other files.",
                    "Name a new folder: --output.",
                )
            return
        if not self.state.is_dir() or not any(p.name.isdigit() for p in self.state.iterdir()):
            return  # it ended before its first checkpoint: nothing is lost
        if resume == "none":
            raise UsageError(
                f"{self.path} holds a training already",
                "Nothing is overwritten.",
                "Go on with it: --resume auto. Or name another --output.",
            )
        try:
            known = json.loads(read_utf8(present))
        except ValueError as error:
            raise InputError(
                f"{present} is damaged", str(error), "Name another --output."
            ) from error
        changed = [
            f"{name} was {_shown(known.get(name))} and is {_shown(identity.get(name))}"
            for name in sorted({*known, *identity})
            if known.get(name) != identity.get(name)
        ]
        if changed:
            raise UsageError(
                f"{self.path} holds another training: {'; '.join(changed)}",
                "Going on would give neither result.",
                "Give the earlier flags and files, or name another --output.",
            )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"
