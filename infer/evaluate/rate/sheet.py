"""A rating sheet: what is on it, the page that people see, and the key, which they do not see.

The page has prompts and answers alone. The key is a JSON file next to it, SHEET.key.json: which
model gave which answer, and which items only check the attention of the rater.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from glm2_jax.cli.text_input import parse_json, read_utf8
from glm2_jax.errors import InputError, UsageError
from infer.evaluate.rate.answers import System
from infer.page import fill_page

CRITERIA = ("readability", "fluency", "accuracy", "helpfulness")
AB, SCORES = SCALES = ("ab", "1-5")
BROKEN = -1  # in place of a model: an answer that was made unreadable
_EVERY = 10  # items for each check of each kind
_FORMAT = "glm2-jax rating key 1"
_PAGE_ID = re.compile(r'id="data">\{"sheet":"([0-9a-f]{16})"')


@dataclass(frozen=True)
class Item:
    """One or two answers to a prompt, in the order in which they are shown.

    `kind` is "item", or one of two checks: "repeat" shows the item `of` again, with its sides
    swapped, and "broken" has an answer that was made unreadable. `models` are indices, or BROKEN.
    """

    id: str
    kind: str
    prompt: str
    models: tuple[int, ...]
    answers: tuple[str, ...]
    of: str = ""


@dataclass(frozen=True)
class Sheet:
    """All items in the order in which they are shown; `identical` = pairs left out."""

    scale: str
    models: tuple[str, ...]
    items: tuple[Item, ...]
    identical: int = 0

    @property
    def id(self) -> str:
        """16 hexadecimal digits of the content."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def key(self) -> bytes:
        """Return the content of the key file."""
        found = {"format": _FORMAT, "sheet": self.id, **asdict(self)}
        return json.dumps(found, ensure_ascii=False, indent=1).encode() + b"\n"

    def page(self) -> str:
        """Return the HTML page: it names no model and no check."""
        items = [{"id": i.id, "prompt": i.prompt, "answers": i.answers} for i in self.items]
        data = {"sheet": self.id, "scale": self.scale, "criteria": CRITERIA, "items": items}
        return fill_page("infer.evaluate.rate", ("page.js",), data)


def make_sheet(systems: Sequence[System], scale: str, seed: int, limit: int | None) -> Sheet:
    """Make a sheet of at most `limit` items, drawn, ordered and turned by a seed, and of checks: a
    repeat and a broken answer, each for every ten items.

    UsageError: --scale ab with one model. InputError: nothing to compare.
    """
    rng = random.Random(seed)
    width = 2 if scale == AB else 1
    if len(systems) < width:
        raise UsageError(
            "--scale ab compares answers of several models, and --answers names one file",
            fix="Name more files, or choose --scale 1-5.",
        )
    drawn: list[Item] = []
    identical = 0
    for key in systems[0].answers:
        for models in itertools.combinations(range(len(systems)), width):
            models = rng.sample(models, width)
            answers = tuple(systems[one].answers[key] for one in models)
            if width == 2 and answers[0] == answers[1]:
                identical += 1
            else:
                drawn.append(Item("", "item", key[0], tuple(models), answers))
    if not drawn:
        raise InputError("there is nothing to compare", "All answers are the same.")
    rng.shuffle(drawn)
    drawn = drawn[:limit]
    numbers, count = range(len(drawn)), -(-len(drawn) // _EVERY)
    order = [("item", number) for number in numbers]
    for number in rng.sample(numbers, count):  # anywhere but at the start
        order.insert(rng.randint(1, len(order)), ("broken", number))
    # Repeats come last: they have to be judged again, not remembered.
    order += [("repeat", number) for number in rng.sample(numbers, count)]
    ids = {one: f"{at:03}" for at, one in enumerate(order, 1)}
    items = []
    for kind, number in order:
        one = drawn[number]
        if kind == "broken":
            one = _broken(rng, one)
        elif kind == "repeat":
            swapped = {"models": one.models[::-1], "answers": one.answers[::-1]}
            one = replace(one, **swapped, of=ids["item", number])
        items.append(replace(one, id=ids[kind, number], kind=kind))
    return Sheet(scale, tuple(one.name for one in systems), tuple(items), identical)


def _broken(rng: random.Random, item: Item) -> Item:
    """Return an item with one of its answers in disorder, for two next to the same in order."""
    which = rng.randrange(len(item.answers))
    letters = [*(item.answers[which] * 2), *"#@%&=+~^"]
    rng.shuffle(letters)
    sides = [(item.models[which], item.answers[which]), (BROKEN, "".join(letters))]
    if len(item.answers) == 1:
        sides = sides[1:]
    rng.shuffle(sides)
    models, answers = zip(*sides, strict=True)
    return replace(item, models=models, answers=answers)


def key_path(sheet: Path) -> Path:
    """Return the place of a sheet's key."""
    return sheet.with_name(f"{sheet.stem}.key.json")


def read_sheet(path: Path) -> Sheet:
    """Return the sheet of a page, from its key; InputError: not found, changed, or of another."""
    place = key_path(path)
    if not place.exists():
        raise InputError(
            f"{place} not found",
            f"It says which model gave which answer, and was written with {path}.",
            "Put it back next to the sheet.",
        )
    try:
        found = parse_json(read_utf8(place))
        items = tuple(
            Item(**{**one, "models": tuple(one["models"]), "answers": tuple(one["answers"])})
            for one in found["items"]
        )
        sheet = Sheet(found["scale"], tuple(found["models"]), items, found["identical"])
        same = found["format"] == _FORMAT and found["sheet"] == sheet.id
    except (KeyError, TypeError, InputError):
        same = False
    if not same:
        fix = "Restore the file that was written with the sheet."
        raise InputError(f"{place} is damaged", "It is not the key of a sheet.", fix)
    if path.exists():
        _check_page(path, place, sheet.id)
    return sheet


def _check_page(path: Path, key: Path, id_of_key: str) -> None:
    """Raise InputError if a page is no sheet, or another one than its key says."""
    found = _PAGE_ID.search(read_utf8(path))
    if found is None:
        what, fix = f"{path} is not a rating sheet", "Restore the page that --answers wrote."
        raise InputError(what, "No number of a sheet is in it.", fix)
    if found[1] != id_of_key:
        raise InputError(
            f"{key} is the key of another sheet",
            f"It is of sheet {id_of_key}, and {path} is sheet {found[1]}.",
            f"Put back the key that was written with {path.name}.",
        )
