"""Rating files: written by the page of a sheet, or for a model by `--judge`, and read here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm2_jax.cli.messages import note
from glm2_jax.cli.text_input import parse_json, read_utf8
from glm2_jax.errors import InputError, shorten
from infer.evaluate.rate.sheet import AB, BROKEN, CRITERIA, Item, Sheet

FORMAT = "glm2-jax ratings 1"
PERSON, MODEL = KINDS = ("person", "model")
_SIDES = {"A": 1, "tie": 0, "B": -1}
_SCORES = {number: number for number in range(1, 6)}
_AGAIN = "Save the ratings in the page again."
Marks = Mapping[str, int]  # criterion -> mark


@dataclass(frozen=True)
class Rater:
    """Who rated, and the marks of each item by its id.

    A mark is 1 to 5, or for two answers 1 = the first one shown is better, 0 = the same, -1.
    """

    name: str
    kind: str
    path: str
    marks: Mapping[str, Marks]

    @property
    def label(self) -> str:
        """The name; that of a model says so."""
        return f"{self.name} (model)" if self.kind == MODEL else self.name


def write_ratings(
    sheet: Sheet, name: str, kind: str, ratings: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """Return the content of a rating file; marks are as the page writes them."""
    found = {"format": FORMAT, "sheet": sheet.id, "rater": name, "kind": kind, "ratings": ratings}
    return json.dumps(found, ensure_ascii=False, indent=1).encode() + b"\n"


def read_raters(sheet: Sheet, paths: Sequence[str]) -> list[Rater]:
    """Return who rated a sheet, each of another name; InputError says what is wrong with a file."""
    raters: dict[tuple[str, str], Rater] = {}
    for path in paths:
        rater = _read(sheet, path)
        if (first := raters.setdefault((rater.name.casefold(), rater.kind), rater)) is not rater:
            raise InputError(
                f"{path}: the ratings of {rater.label} are given twice",
                f"{first.path} has them, too.",
                "Leave out the older file; two people need different names.",
            )
    return list(raters.values())


def _parse(path: str) -> Any:
    """Return the value of a JSON file; InputError: no such file, cut, a key twice."""
    try:
        text = read_utf8(path)
    except InputError as error:
        fix = error.fix or "Name files that raters saved: --rates F ..."
        raise InputError(error.what, error.why, fix) from None
    try:
        return parse_json(text)
    except InputError as error:
        if error.what != "not JSON":  # it is complete
            raise InputError(f"{path}: {error.what}", error.why, _AGAIN) from None
        what = f"{path} is not complete JSON"
        raise InputError(what, error.cause, f"It may have been cut. {_AGAIN}") from None


def _read(sheet: Sheet, path: str) -> Rater:
    found = _parse(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path} is not a file of ratings", f"Expected the format {FORMAT!r}.")
    if found.get("sheet") != sheet.id:
        raise InputError(
            f"{path} rates another sheet",
            f"It is of sheet {shorten(found.get('sheet'))}, and this is {sheet.id}.",
            "Name the sheet that was rated: --sheet FILE.html.",
        )
    name, kind, ratings = found.get("rater"), found.get("kind"), found.get("ratings")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{path} does not say who rated", _field(found, "rater"), _AGAIN)
    if kind not in KINDS:
        why = f"{_field(found, 'kind')} Expected {' or '.join(KINDS)}."
        raise InputError(f"{path} does not say what kind of rater rated", why, _AGAIN)
    if not isinstance(ratings, dict):
        raise InputError(f"{path} has no ratings", _field(found, "ratings"), _AGAIN)
    if not ratings:
        note(f"{path}: {name.strip()} has rated nothing")
    marks = _marks(sheet, path, ratings)
    return Rater(name.strip(), kind, path, marks)


def _field(found: Mapping[str, Any], name: str) -> str:
    """Return what is wrong with a field."""
    is_there = name in found
    return f"{name} is {shorten(found[name])}." if is_there else f"The field {name} is missing."


def _marks(sheet: Sheet, path: str, ratings: Mapping[str, Any]) -> dict[str, Marks]:
    """Return the marks of each item by its id; InputError: an unknown item, criterion or mark."""
    known = {item.id for item in sheet.items}
    words: Mapping[Any, int] = _SIDES if sheet.scale == AB else _SCORES
    marks = {}
    for item, given in ratings.items():
        if item not in known:
            what, why = f"{path}: unknown item {shorten(item)}", f"The sheet has {len(known)}."
            raise InputError(what, why, _AGAIN)
        if isinstance(given, dict) and (more := [key for key in given if key not in CRITERIA]):
            what = f"{path}: item {item}: unknown criterion {shorten(more[0])}"
            raise InputError(what, f"Known: {', '.join(CRITERIA)}.", _AGAIN)
        try:
            marks[item] = {name: words[given[name]] for name in CRITERIA}
        except (KeyError, TypeError):
            what, expected = f"{path}: item {item}: {shorten(given)}", ", ".join(map(str, words))
            raise InputError(
                what, f"Expected one of {expected} for each criterion.", _AGAIN
            ) from None
    return marks


@dataclass(frozen=True)
class Attention:
    """The checks that a rater has answered, and those that failed."""

    broken: int
    broken_failed: int
    repeats: int
    repeats_failed: int

    @property
    def inattentive(self) -> bool:
        """Whether a broken answer was taken, or more than half of the repeats differ."""
        return self.broken_failed > 0 or 2 * self.repeats_failed > self.repeats


def attention(sheet: Sheet, rater: Rater) -> Attention:
    """Count the checks. A broken answer fails where on average it is not worse, or its mean is
    above 2; a repeat where most criteria turn around, or differ by 2 or more."""
    broken = repeats = broken_failed = repeats_failed = 0
    for item in sheet.items:
        marks = rater.marks.get(item.id)
        if marks is None:
            continue
        if item.kind == "broken":
            broken += 1
            broken_failed += _takes_broken(sheet, item, marks)
        elif item.kind == "repeat" and (before := rater.marks.get(item.of)):
            repeats += 1
            side = -1 if sheet.scale == AB else 1  # the sides are swapped
            far = [abs(side * marks[name] - before[name]) >= 2 for name in CRITERIA]
            repeats_failed += 2 * sum(far) > len(far)
    return Attention(broken, broken_failed, repeats, repeats_failed)


def _takes_broken(sheet: Sheet, item: Item, marks: Marks) -> bool:
    mean = sum(marks.values()) / len(marks)
    if sheet.scale == AB:
        return (mean if item.models[0] == BROKEN else -mean) >= 0
    return mean > 2
