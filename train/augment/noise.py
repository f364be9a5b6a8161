"""Noise as people type it: typos, homophones, full and half width, simplified and traditional.

Each function returns the text itself where there is nothing to change. Imports no jax.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from random import Random

from train.augment.spans import NEGATIONS, NUMERALS, change_free, free_places, pieces
from train.data.language import has_chinese

_WIDE = 0xFEE0  # between a character of ASCII and its full-width form
# No brackets: they could become those of a special token.
_RUN = re.compile(r"[A-Za-z]+|[\uff21-\uff3a\uff41-\uff5a]+|[!(),.:;?！（），．：；？]")


def chosen(places: list[int], rng: Random, rate: float) -> list[int]:
    """Return a share of the places, at least one if there are any."""
    return rng.sample(places, min(len(places), max(1, round(rate * len(places)))))


def typo(text: str, rng: Random, rate: float) -> str:
    """Swap letters or Chinese characters with their neighbors, drop or repeat them; a negation is
    not dropped."""
    free = free_places(text)
    characters, places = list(text), set(free)
    picked = dict.fromkeys(chosen(free, rng, rate))
    for at in picked:
        kind = rng.choice(("swap", "drop", "repeat"))
        if kind == "swap" and at + 1 in places and at + 1 not in picked:
            characters[at : at + 2] = characters[at + 1], characters[at]
        elif kind == "drop" and len(free) > 1 and characters[at] not in NEGATIONS:
            characters[at] = ""
        else:
            characters[at] *= 2
    return "".join(characters)


def homophone(text: str, rng: Random, rate: float) -> str:
    """Replace Chinese characters by common ones of the same syllable, of any tone."""
    from pypinyin import lazy_pinyin

    syllables = lazy_pinyin(text, errors=list)  # type: ignore[arg-type]  # one for each character
    others = {
        at: [char for char in _by_syllable().get(syllables[at], ()) if char != text[at]]
        for at in free_places(text)
        if has_chinese(text[at])
    }
    characters = list(text)
    for at in chosen([at for at, found in others.items() if found], rng, rate):
        characters[at] = rng.choice(others[at])
    return "".join(characters)


@cache
def _by_syllable() -> dict[str, list[str]]:
    """Return the 3755 characters of the first level of GB 2312 by their syllables, but no
    numerals."""
    from pypinyin import lazy_pinyin

    found: dict[str, list[str]] = defaultdict(list)
    for row in range(0xB0, 0xD8):
        characters = bytes(x for cell in range(0xA1, 0xFF) for x in (row, cell))
        for char in characters.decode("gb2312", "ignore"):
            if char not in NUMERALS:
                found[lazy_pinyin(char)[0]].append(char)
    return dict(found)


def width(text: str, rng: Random, rate: float) -> str:
    """Write Latin words and punctuation in full width, or in half width where they are in full
    width: each with a probability of one half, at least one."""
    count = sum(len(_RUN.findall(piece)) for piece, free in pieces(text) if free)
    flipped = {n for n in range(count) if rng.random() < 0.5} or {rng.randrange(max(count, 1))}
    numbers = itertools.count()

    def flip(run: re.Match[str]) -> str:
        shift = -_WIDE if run[0] > "\uff00" else _WIDE
        return "".join(chr(ord(x) + shift) for x in run[0]) if next(numbers) in flipped else run[0]

    return change_free(text, partial(_RUN.sub, flip))


def script(text: str, rng: Random, rate: float) -> str:
    """Write simplified characters as traditional ones; a text in traditional ones as simplified."""
    simplified = change_free(text, _converter("t2s"))
    return simplified if simplified != text else change_free(text, _converter("s2tw"))


@cache
def _converter(config: str) -> Callable[[str], str]:
    from opencc import OpenCC

    convert = OpenCC(config).convert
    return lambda text: "\0".join(map(convert, text.split("\0")))  # it stops at a NUL
