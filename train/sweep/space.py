"""The space of a search: settings of `train.lora` by their names, each with values or a range."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.parser import Parser
from glm2_jax.errors import UsageError, shorten
from train.options import EvaluationOptions
from train.recipe import NO_EFFECT, NOT_SETTINGS, name_of, read_settings
from train.sweep.options import SweepOptions

Point = Mapping[str, str]  # a value for each setting, as it is written in a recipe
_RANGE = re.compile(r"([^:]+)\.\.([^:]+?)(:log)?(?::([1-9]\d*))?")
_USEFUL = {"data", "mix-data", "init-adapter"}  # they change the result, though not as flags do
# With other values of these, the validation loss would measure something else.
_MEASURE = {
    "train-on-prompt", "format", "max-length", "max-bad", "template", "family",
    *(name.replace("_", "-") for name in vars(EvaluationOptions())),
}  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """Some values."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """All numbers between two, both included."""

    low: float
    high: float
    log: bool
    whole: bool

    def text(self, value: float) -> str:
        """Return one of its numbers as it is written in a recipe."""
        return text(round(value) if self.whole else value)

    def some(self, count: int) -> Choices:
        """Return values at equal distances."""
        spread = np.geomspace if self.log else np.linspace
        found = spread(self.low, self.high, count).tolist()
        return Choices(tuple(dict.fromkeys(map(self.text, found))))


Space = dict[str, Choices | Range]


def text(value: Any) -> str:
    """Return a value as it is written in a recipe; numbers of a range have four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_space(parser: Parser, given: Sequence[str]) -> Space:
    """Return the space that `--space` names, checked against the settings of a command; UsageError
    where it is empty or holds what cannot be searched."""
    own = {field.name for field in fields(SweepOptions)} | {"job"}
    actions = {name_of(x): x for x in parser._actions if x.dest not in {*NOT_SETTINGS, *own}}
    space: Space = {}
    for written in given:
        name, equals, values = written.partition("=")
        if not equals or Path(written).is_file():
            found = read_settings(Path(path_argument(written)))
        else:
            found = {name: values}
        for name, values in found.items():
            name = str(name).replace("_", "-")
            if name in space:
                raise UsageError(f"--space: {name} is given twice.")
            space[name] = _axis(actions, name, values)
    if not space:
        raise UsageError(
            "--space is empty, so there is nothing to search.",
            fix="Name settings and their values: --space lr=1e-5..1e-3:log rank=4,8,16",
        )
    return space


def _axis(actions: Mapping[str, argparse.Action], name: str, written: Any) -> Choices | Range:
    """Return the values of one setting."""
    action = actions.get(name)
    searched = {
        known for known in actions
        if known not in _MEASURE and (known not in NO_EFFECT or known in _USEFUL)
    }  # fmt: skip
    if action is None or name not in searched:
        known = f"Known: {', '.join(sorted(searched))}."
        if action is None:
            raise UsageError(f"--space: {name} is not a setting of train.lora.", fix=known)
        why = "The trials would be the same, or their validation losses could not be compared."
        raise UsageError(f"--space: {name} cannot be searched.", why, known)
    match = _RANGE.fullmatch(written) if isinstance(written, str) else None
    try:
        ends = (float(match[1]), float(match[2])) if match else None
    except ValueError:  # a path such as ../rows.jsonl
        ends = None
    if match and ends:
        found = _range(action, name, written, ends, log=match[3] is not None)
        return found if match[4] is None else found.some(int(match[4]))
    values = written.split(",") if isinstance(written, str) else written
    good = isinstance(values, list) and all(isinstance(x, str) and x.strip() for x in values)
    if not good or not values:
        fix = "Write A,B,C or LOW..HIGH[:log][:COUNT]; in a file also a list."
        raise UsageError(f"--space: {name} cannot be {shorten(written)}.", fix=fix)
    return Choices(tuple(dict.fromkeys(x.strip() for x in values)))


def _range(
    action: argparse.Action, name: str, written: str, ends: tuple[float, float], *, log: bool
) -> Range:
    low, high = ends
    if not _takes(action, "1") or _takes(action, "x"):
        raise UsageError(f"--space: {name} is not a number, so it has no range {written}.")
    if not -math.inf < low < high < math.inf or (log and low <= 0):
        least = "0 < LOW < HIGH" if log else "LOW < HIGH"
        raise UsageError(f"--space: {name}={written} must have {least}.")
    whole = not _takes(action, "1.5")
    if whole and not (low.is_integer() and high.is_integer()):
        raise UsageError(f"--space: {name} takes whole numbers, got {written}.")
    return Range(low, high, log, whole)


def _takes(action: argparse.Action, written: str) -> bool:
    """Return whether a flag takes this text."""
    parse: Any = action.type
    try:
        return action.nargs != 0 and action.choices is None and (parse or str)(written) is not None
    except (argparse.ArgumentTypeError, ValueError):
        return False


def first_point(space: Space) -> dict[str, str]:
    """Return the first value of every setting."""
    return {
        name: axis.values[0] if isinstance(axis, Choices) else axis.text(axis.low)
        for name, axis in space.items()
    }


def edges(space: Space) -> Iterator[dict[str, str]]:
    """Yield points with each value of each setting, and both ends of each range."""
    first = first_point(space)
    for name, axis in space.items():
        whole = isinstance(axis, Choices)
        values = axis.values if whole else map(axis.text, (axis.low, axis.high))
        yield from ({**first, name: value} for value in values)


def grid_size(space: Space) -> int:
    """Return the number of combinations; UsageError where a range has no end of values."""
    for name, axis in space.items():
        if isinstance(axis, Range):
            raise UsageError(
                f"--search grid needs values, and {name} is a range.",
                fix=f"List them, or say how many: --space {name}={axis.low:g}..{axis.high:g}"
                f"{':log' * axis.log}:5",
            )
    return math.prod(len(axis.values) for axis in space.values() if isinstance(axis, Choices))


def grid_point(space: Space, number: int) -> dict[str, str]:
    """Return a combination by its number."""
    found = {}
    for name, axis in space.items():
        assert isinstance(axis, Choices)
        number, at = divmod(number, len(axis.values))
        found[name] = axis.values[at]
    return found
