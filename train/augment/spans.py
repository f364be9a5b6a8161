"""The parts of a text that no method may change: numbers, names, quotations, code, special tokens.

Imports no jax.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from train.data.language import CODE, ZH, language_of

NUMERALS = "零〇一二三四五六七八九十百千万亿两"
NEGATIONS = tuple("不没无非未勿别")
# Each alternative fails at once inside what it failed on before: base64 and the like are long.
_QUOTED = r"《[^《》\n]*》|“[^“”\n]*”|\"[^\"\n]*\"|「[^「」\n]*」|『[^『』\n]*』|`[^`\n]+`"
_WORD = r"(?<![A-Za-z])[A-Za-z][A-Za-z0-9_+#-]*"
# Capitalized words one after another, and one that does not begin a sentence; Qwen2, GPT-4, iPhone.
_NAME = (
    r"(?<!\w)[A-Z][\w'’-]*(?: [A-Z][\w'’-]*)+"
    r"|(?<!^)(?<![.!?] )(?<![。！？\n])(?<![A-Za-z])[A-Z][A-Za-z0-9'’-]*"
    r"|(?<![A-Za-z])[A-Za-z]*(?:[a-z][A-Z]|[A-Za-z]-?\d)[A-Za-z0-9-]*"
)
_NUMBER = rf"\d[\d.,:/%]*|[{NUMERALS}]+"
_KEPT = (
    r"```.*?(?:```|\Z)"
    r"|<[^<>\s]{1,40}>|\[[A-Za-z][\w ]{0,20}\]"  # special tokens, tags, blanks
    r"|(?<!\w)\w+://\S+|(?<![\w.+-])[\w.+-]+@[\w-]+\.[\w.]+"  # addresses
    rf"|{_QUOTED}|{_NAME}|{_NUMBER}"
)
_PROTECTED = re.compile(_KEPT, re.DOTALL | re.ASCII)
_PROTECTED_ZH = re.compile(rf"{_KEPT}|{_WORD}", re.DOTALL | re.ASCII)
_QUOTES = re.compile(_QUOTED)
_NAMES, _LATIN = re.compile(_NAME, re.ASCII), re.compile(_WORD, re.ASCII)
_NUMBERS = re.compile(_NUMBER)


def pieces(text: str) -> list[tuple[str, bool]]:
    """Split a text into pieces, each with whether it may be changed: nothing of code, and in a
    Chinese text no Latin word, which is taken for a name."""
    language = language_of(text)
    if language == CODE and "```" not in text:
        return [(text, False)]
    pattern = _PROTECTED_ZH if language == ZH else _PROTECTED
    found, at = [], 0
    for match in pattern.finditer(text):
        found += [(text[at : match.start()], True), (match[0], False)]
        at = match.end()
    return [(piece, free) for piece, free in [*found, (text[at:], True)] if piece]


def change_free(text: str, change: Callable[[str], str]) -> str:
    """Return a text whose free pieces are changed."""
    return "".join(change(piece) if free else piece for piece, free in pieces(text))


def free_places(text: str) -> list[int]:
    """Return the places of the letters and Chinese characters that may be changed."""
    places, at = [], 0
    for piece, free in pieces(text):
        places += [at + n for n, char in enumerate(piece) if free and char.isalpha()]
        at += len(piece)
    return places


def numbers(text: str) -> Counter[str]:
    """Return the numbers of a text, of digits and of Chinese numerals; 一 alone is none (一下)."""
    found = _NUMBERS.findall(unicodedata.normalize("NFKC", text))
    return Counter(x.rstrip(".,:/") for x in found if x != "一")


def names(text: str) -> set[str]:
    """Return what is in quotation marks, 书名号 or backquotes, capitalized names, and the Latin
    words of a Chinese text, in lower case."""
    found = [quoted[1:-1] for quoted in _QUOTES.findall(text)]
    found += (_LATIN if language_of(text) == ZH else _NAMES).findall(text)
    return {name.casefold() for name in found if name}
