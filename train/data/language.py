"""Which language a text is in, and the units that its figures count. Imports no jax."""

from __future__ import annotations

import re

from glm2_jax.text.chinese import CHINESE, RANGES

_UNIT = re.compile(rf"[{RANGES}]|[^\W_{RANGES}]+(?:['’-][^\W_{RANGES}]+)*")
_LETTERS = r"A-Za-z\u00c0-\u024f"
_LATIN = re.compile(rf"[{_LETTERS}]+(?:['’-][{_LETTERS}]+)*")
_OTHERS = re.compile(rf"[^\W\d_{_LETTERS}{RANGES}]+")
_FENCE = re.compile(r"^ *```", re.MULTILINE)
# A line that ends like a statement, or begins like one of Python, C, SQL or a shell.
_CODE = re.compile(
    r"[;{}]\s*$|^\s*(?:def \w+\(|class \w+[(:]|(?:from [\w.]+ )?import [\w.]+(?: as \w+)?$"
    r"|#include\b|SELECT\b.*\bFROM\b|\$ |[\w.]+ = \S|[\w.]+\(.*\)$)"
)
_MOST = 0.8  # the share of a text that makes it one of a language
ZH, EN, MIXED, CODE, OTHER = "zh", "en", "mixed", "code", "other"
LANGUAGES = (ZH, EN, MIXED, CODE, OTHER)


def has_chinese(text: str) -> bool:
    """Return whether a text has Chinese characters."""
    return bool(CHINESE.search(text))


def units(text: str) -> list[str]:
    """Return the Chinese characters and the words of a text, in lower case."""
    return _UNIT.findall(text.casefold())


def language_of(text: str) -> str:
    """Return zh, en, mixed, code or other.

    A text with a fenced block, or half of whose lines look like statements, is code. In others
    Chinese characters, Latin words, and words of other scripts count one each: four of five
    decide, less is mixed. Latin words count as English. A text without any of them is other.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if _FENCE.search(text) or sum(bool(_CODE.search(x)) for x in lines) * 2 >= max(len(lines), 1):
        return CODE
    counts = {
        ZH: len(CHINESE.findall(text)),
        EN: len(_LATIN.findall(text)),
        OTHER: len(_OTHERS.findall(text)),
    }
    name = max(counts, key=counts.__getitem__)
    if not (total := sum(counts.values())):
        return OTHER
    return name if counts[name] >= _MOST * total else MIXED
