"""Files of ideas: read, run, and named with a line where one fails."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from glm2_jax.cli.main import is_out_of_memory
from glm2_jax.cli.text_input import read_utf8
from glm2_jax.errors import DeviceError, GLMError, InputError, UsageError, shorten
from glm2_jax.ideas import Idea, place_of
from infer.lab.sample import Sample

_WORDS = {"true": True, "false": False}
_OUTSIDE = "It was raised outside of the file, with what the idea returned or keeps."


@dataclass(frozen=True)
class IdeaFile:
    """A file with a function `idea`, and the options that it is called with."""

    path: str
    make: Callable[..., Any]
    measures: bool  # whether it takes a sample
    options: dict[str, Any]  # its keyword arguments, all of them

    @property
    def name(self) -> str:
        """What a table calls it."""
        return Path(self.path).stem

    def idea(self, sample: Sample) -> Idea:
        """Call the function; InputError: it raises, or returns something else."""
        with blamed(self.path):
            made = self.make(*(sample,) * self.measures, **self.options)
        if isinstance(made, Idea):
            return made
        raise InputError(
            f"{place_of(self.make)} returned {shorten(made)}.",
            "Expected glm2_jax.ideas.Idea.",
            "Return Idea(...), with the functions that it changes.",
        )


def read_ideas(paths: Sequence[str], given: Sequence[tuple[str, str]]) -> list[IdeaFile]:
    """Read files of ideas, and the options that `--set` gives: (name, text).

    InputError: a file is not found, is not Python, raises, or has no function `idea`. UsageError:
    an option that no file has, a value that does not fit its default, or two files of one name.
    """
    _check_names(paths)
    found = [_read(path) for path in paths]
    for name, text in given:
        stem, _, option = name.rpartition(".")
        fits = [file for file in found if option in file.options and stem in ("", file.name)]
        if not fits:
            known = [f"{file.name}: {', '.join(file.options) or 'none'}" for file in found]
            raise UsageError(
                f"--set {name}={text}: no idea has this option.", known, "Correct the name."
            )
        for file in fits:
            file.options[option] = _value(f"--set {name}={text}", text, file.options[option])
    return found


def _check_names(paths: Sequence[str]) -> None:
    """Raise UsageError for two files that a table, and `--set`, could not tell apart."""
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.get(Path(path).stem)
        seen[Path(path).stem] = path
        if other is None:
            continue
        if os.path.realpath(other) == os.path.realpath(path):
            raise UsageError(
                f"{path} is named twice.",
                "Each idea is measured once, with one set of options.",
                "Name it once; for other options run the command again.",
            )
        raise UsageError(
            f"{other} and {path} have one name, {Path(path).stem}.",
            "The table and --set STEM.NAME=VALUE know an idea by it.",
            "Rename one of the files.",
        )


def _read(path: str) -> IdeaFile:
    text = read_utf8(path)
    try:
        code = compile(text, path, "exec")
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL character
        line = getattr(error, "lineno", None) or 1
        why = getattr(error, "msg", str(error))
        raise InputError(
            f"{path}:{line}: not Python: {why}.", fix="Name a Python file with a function `idea`."
        ) from error
    module = ModuleType(f"glm2_lab_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # as a dataclass in it needs
    with blamed(path):
        exec(code, module.__dict__)
    make = getattr(module, "idea", None)
    if not inspect.isfunction(make):
        raise InputError(
            f"{path} has no function `idea`.",
            "The lab calls it with the options, and it returns glm2_jax.ideas.Idea.",
            "Add one: def idea(*, share=0.5): return Idea(...)",
        )
    named = inspect.signature(make).parameters.values()
    options = {p.name: p.default for p in named if p.kind is p.KEYWORD_ONLY}
    places = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
    missing = [name for name, default in options.items() if default is inspect.Parameter.empty]
    if missing or len(places) > 1:
        raise InputError(
            f"{place_of(make)} cannot be called.",
            f"Expected at most a sample, and options with defaults after *, got "
            f"{inspect.signature(make)}.",
            "Write def idea(sample, *, share=0.5), or def idea(*, share=0.5).",
        )
    return IdeaFile(path, make, bool(places), options)


def _value(flag: str, text: str, default: Any) -> Any:
    """Return a value of the type of a default; without one, a number where it looks like one."""
    if default is None:
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(text)
        return text
    kind = type(default)
    try:
        return _WORDS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{flag}: not a value of type {kind.__name__}.", f"The default is {default!r}."
        ) from None


@contextlib.contextmanager
def blamed(path: str) -> Iterator[None]:
    """Turn what a file of an idea raises into an InputError that names its line, or the file where
    the error came up outside of it."""
    try:
        yield
    except (Exception, SystemExit) as error:  # an idea must not end the command
        named = isinstance(error, GLMError) and error.what.startswith(f"{path}:")
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        ended = isinstance(error, SystemExit)
        if named or isinstance(error, DeviceError) or is_out_of_memory(error):
            raise
        if not frames and isinstance(error, GLMError | OSError):
            raise
        place = f"{path}:{frames[-1].lineno}" if frames else path
        if isinstance(error, GLMError):
            what, why = f"{place}: {error.what}", error.why.splitlines()
            raise InputError(what, why, error.fix) from error
        lines = str(error).strip().splitlines() or [""]
        why = "" if ended else _OUTSIDE
        if frames:
            why = f"In {frames[-1].name}: {frames[-1].line}"
        raise InputError(
            f"{place}: {type(error).__name__}: {lines[0]}",
            why,
            "Correct the file; --debug shows the traceback.",
        ) from error
