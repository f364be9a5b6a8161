"""The folder of a run: its lock, what it was started from, and where its checkpoints are stored, in
the file system or in a bucket of Google Cloud Storage."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from convert.layouts.peft_config import CONFIG
from glm2_jax.cli.files import BUCKET, writer_lock
from glm2_jax.errors import GLMError, InputError, UsageError
from glm2_jax.processes import join

MODEL = "model"  # the result of a training of all parameters
# What must be the same where a training starts from the result of another.
_OF_RESULT = ("command", "base", "template", "--rank", "--alpha", "--target", "--rslora", "--dora")
# Command -> how another run starts from its result: a flag, the result's folder, a file in it.
_FURTHER = {"lora": ("--init-adapter", "", CONFIG), "full": ("--model", MODEL, "config.json")}
SEEN = ".seen"  # the first process makes it in a folder for a moment
_IDENTITY, _NEW, _LOCK, _RECIPE = "run.json", "run.json.new", ".lock", "recipe.yml"


def recorded(path: str | Path, name: str) -> Any:
    """Return a setting that the run in a folder of checkpoints was begun with; None where there is
    no run, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        folder = absolute(path)
        if _holds_steps(folder / "state"):
            return _read_identity(folder).get(name)
    return None


class RunFolder:
    """The output folder of one run, made if it is missing, locked while it is open. A context
    manager.

    `identity` is what the result depends on, as JSON values; `checkpoints` another folder for the
    checkpoints, also in object storage. Of several processes only the first writes; all read.
    UsageError where it holds other files, a run of another identity, or any run with
    `resume="none"`.
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
        self.state, self.best = self.checkpoints / "state", self.checkpoints / "best"
        self.log = self.path / "log.jsonl"  # where no other was given
        self._elsewhere = self.checkpoints != absolute(self.path)
        self._identity = json.loads(json.dumps(identity))  # as it is read back
        with contextlib.ExitStack() as opened:
            with self._writing():
                self.path.mkdir(parents=True, exist_ok=True)
                if join.is_first():
                    opened.enter_context(writer_lock(self.path / _LOCK, self.path))
            with using(self.checkpoints):
                check_shared(self.checkpoints)
                self._check_contents()
                if _holds_steps(self.state):  # else it ended before: nothing is lost
                    self._check_run(resume)
            self._close = opened.pop_all().close

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            fix = "Name another --output."
            raise InputError(f"{self.path} cannot be written", reason, fix) from error

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """Make the folder that of this run, whose flags are `recipe`."""
        if not join.is_first():
            return
        text = json.dumps(self._identity, indent=1, ensure_ascii=False)
        if self._elsewhere:
            with using(self.checkpoints):
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                (self.checkpoints / _IDENTITY).write_text(text)
        with self._writing():
            written = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
            (self.path / _RECIPE).write_text(written, encoding="utf-8")
            (self.path / _NEW).write_text(text, encoding="utf-8")
            (self.path / _NEW).replace(self.path / _IDENTITY)

    def _check_contents(self) -> None:
        ours = {_LOCK, _NEW, _RECIPE, SEEN}
        others = sorted({path.name for path in self.path.iterdir()} - ours)
        if others and _IDENTITY not in others:
            raise UsageError(
                f"{self.path} holds {', '.join(others[:5])}, but no run of this command",
                "Training does not write into a folder with other files.",
                "Name a new folder: --output.",
            )
        if self._elsewhere and _holds_steps(absolute(self.path) / self.state.name):
            raise UsageError(
                f"{self.path} holds checkpoints itself",
                f"With --checkpoints {self.checkpoints} the training would start over.",
                "Leave --checkpoints out, or name another --output.",
            )

    def _check_run(self, resume: str) -> None:
        """Compare the run that the checkpoints are of with this one."""
        present, identity = self.checkpoints / _IDENTITY, self._identity
        try:
            known = _read_identity(self.checkpoints)
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
            raise UsageError(
                f"{self.checkpoints} holds another training: {'; '.join(changed)}",
                "Resuming it with other settings would mix both, and nothing is overwritten.",
                f"Give the earlier flags and files, or name another --output{self._start(known)}.",
            )
        if resume == "none":
            raise UsageError(
                f"{self.checkpoints} holds a training already",
                "Nothing is overwritten.",
                "Resume it: --resume auto. Or name another --output.",
            )

    def _start(self, known: Mapping[str, Any]) -> str:
        """Return how another training can start from the result of this one, if it can."""
        identity = self._identity
        if any(known.get(name) != identity.get(name) for name in _OF_RESULT):
            return ""
        command = str(identity["command"]).rpartition(".")[2]
        if command not in _FURTHER:
            return ""
        flag, folder, proof = _FURTHER[command]
        result = self.path / folder
        when = "" if (result / proof).exists() else "once it has ended, "
        place = free_place(self.path, self.checkpoints if self._elsewhere else None)
        return f", or {when}start from its result: {flag} {shlex.quote(str(result))} {place}"


def _read_identity(folder: epath.Path) -> dict[str, Any]:
    """Return the identity of a run; versions up to 0.2 wrote true for "full", false for "none"."""
    found = json.loads((folder / _IDENTITY).read_text())
    old = {True: "full", False: "none"}
    return {name: old.get(x, x) if name == "--grad-checkpoint" else x for name, x in found.items()}


def _holds_steps(folder: epath.Path) -> bool:
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"


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
            "Install gcsfs, log in (gcloud auth application-default login), or check the "
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
