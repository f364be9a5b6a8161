"""The folder of a run: its lock, what it was made from, and what lies in it."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from convert.layouts.peft_config import CONFIG
from glm2_jax.cli.messages import note
from glm2_jax.errors import InputError, UsageError
from glm2_jax.processes import join
from train.run_folder.storage import SEEN, absolute, check_shared, free_place, using

_RECIPE, _LOG, _STATE, _BEST = "recipe.yml", "log.jsonl", "state", "best"
MODEL = "model"  # the result of a training of all parameters
# What has to be the same where a training starts from the result of another.
_OF_RESULT = ("command", "base", "template", "--rank", "--alpha", "--target", "--rslora")
_IDENTITY, _NEW, _LOCK = "run.json", "run.json.new", ".lock"


class RunFolder:
    """The output folder of one run, locked as long as it is open. A context manager.

    Of several processes of a run the first one alone writes into it; all read what is there.

    Args:
        path: made if it is not there.
        resume: "auto" goes on with the run that is there, if any; "none" wants none.
        identity: what the result depends on, as JSON values: name -> value.
        checkpoints: another folder for the checkpoints alone, also of object storage.

    Raises:
        UsageError: the folder holds a run and `resume` is "none", or its run was made from
            something else, or it holds other things.
        InputError: another training is at it, or it cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resume: str,
        identity: Mapping[str, Any],
        checkpoints: str | None = None,
    ):
        self.path = Path(path)
        self.checkpoints = absolute(path if checkpoints is None else checkpoints)
        self._identity = json.loads(json.dumps(identity))  # as it is read back
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        try:
            if join.is_first():
                self._take_lock()
            with using(self.checkpoints):
                check_shared(self.checkpoints)
                self._check(resume, self._identity)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """From here on the folder is that of this run, of which `recipe` are the flags."""
        if not join.is_first():
            return
        text = json.dumps(self._identity, indent=1, ensure_ascii=False)
        if self._elsewhere:
            with using(self.checkpoints):
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                (self.checkpoints / _IDENTITY).write_text(text)
        try:
            write_recipe(self._file(_RECIPE), recipe)
            self._file(_NEW).write_text(text, encoding="utf-8")
            self._file(_NEW).replace(self._file(_IDENTITY))
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    @property
    def state(self) -> epath.Path:
        """Where the checkpoints of the training are."""
        return self.checkpoints / _STATE

    @property
    def best(self) -> epath.Path:
        """Where the best of what was evaluated is, for runs that may end early."""
        return self.checkpoints / _BEST

    @property
    def _elsewhere(self) -> bool:
        return self.checkpoints != absolute(self.path)

    @property
    def log(self) -> Path:
        """Where its log is, if no other place was named."""
        return self._file(_LOG)

    def _file(self, name: str) -> Path:
        return self.path / name

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another training writes {self.path}",
                f"It holds the lock of {_LOCK} there.",
                "Wait for it, or name another --output.",
            ) from None
        except OSError:
            note(f"warning: {self.path} has no locks; start no second run with this --output")

    def _check(self, resume: str, identity: Mapping[str, Any]) -> None:
        if not self._file(_IDENTITY).exists():
            others = sorted(
                {path.name for path in self.path.iterdir()} - {_LOCK, _NEW, _RECIPE, SEEN}
            )
            if others:
                raise UsageError(
                    f"{self.path} holds {', '.join(others[:5])}, and no run of this command",
                    "A training does not write among other files.",
                    "Name a new folder: --output.",
                )
        if self._elsewhere and _holds_steps(absolute(self.path) / _STATE):
            raise UsageError(
                f"{self.path} holds checkpoints itself",
                f"Those in {self.checkpoints} would begin anew.",
                "Leave --checkpoints out, or name another --output.",
            )
        if not _holds_steps(self.state):
            return  # it ended before its first checkpoint: nothing is lost
        present = self.checkpoints / _IDENTITY
        try:
            known = json.loads(present.read_text())
        except (ValueError, FileNotFoundError) as error:
            raise InputError(
                f"{present} is damaged", str(error), "Name another --output."
            ) from error
        changed = [
            f"{name} was {_shown(known.get(name))} and is {_shown(identity.get(name))}"
            for name in sorted({*known, *identity})
            if known.get(name) != identity.get(name)
        ]
        if changed:
            fix = "Give the earlier flags and files, or name another --output"
            raise UsageError(
                f"{self.checkpoints} holds another training: {'; '.join(changed)}",
                "Going on would give neither result, and nothing is overwritten.",
                f"{fix}{self._start(known, identity)}.",
            )
        if resume == "none":
            raise UsageError(
                f"{self.checkpoints} holds a training already",
                "Nothing is overwritten.",
                "Go on with it: --resume auto. Or name another --output.",
            )

    def _start(self, known: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
        """How another training can start from the result of this one, if it can."""
        if any(known.get(name) != identity.get(name) for name in _OF_RESULT):
            return ""
        if str(identity["command"]).endswith("lora"):
            flag, result, proof = "--init-adapter", self.path, CONFIG
        else:
            flag, result, proof = "--model", self._file(MODEL), "config.json"
        when = "" if (result / proof).exists() else "once it has ended, "
        place = free_place(self.path, self.checkpoints if self._elsewhere else None)
        return f", or {when}start from its result: {flag} {shlex.quote(str(result))} {place}"


def _cannot_write(path: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(f"{path} cannot be written", reason, "Name another --output.")


def _holds_steps(folder: epath.Path) -> bool:
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """Writes a recipe as YAML."""
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
