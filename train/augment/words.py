"""Easy data augmentation (Wei and Zou, 2019): synonyms for words, words swapped, words left out.

Chinese is cut into words by jieba, which is imported where a text has Chinese characters. Imports
no jax.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from glm2_jax.cli.text_input import read_utf8
from glm2_jax.errors import InputError
from glm2_jax.text.chinese import RANGES
from train.augment.noise import chosen
from train.augment.spans import NEGATIONS, pieces
from train.data.language import has_chinese

SYNONYMS = Path(__file__).with_name("synonyms.txt")
# Without these a text asks for something else.
_ASKING = frozenset(
    "谁 哪 哪里 哪儿 哪个 哪些 什么 怎么 怎样 怎么样 为什么 多少 几 何 如何 是否 "
    "not no never nor without who whom whose what which where when why how".split()
)
_TOKEN = re.compile(rf"[A-Za-z]+(?:['’-][A-Za-z]+)*|[{RANGES}]+|[^\W\d_]+|.", re.DOTALL)
_DRAWN = 20  # words, of which the first other one changes places with a word
_SEPARATORS = re.compile(r"\s*[,，、;；\t]\s*")


def read_synonyms(path: str | Path = SYNONYMS) -> dict[str, list[str]]:
    """Return the synonyms of each word of a file: a line holds words of one meaning, separated by
    commas; a # begins a comment. InputError for a line with one word, or a file without words."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(read_utf8(path).splitlines(), 1):
        if not (line := line.partition("#")[0].strip()):
            continue
        words = list(dict.fromkeys(filter(None, _SEPARATORS.split(line))))
        if len(words) < 2:
            raise InputError(
                f"{path}:{number}: a line needs at least two words, got {words[:1]}",
                fix="Separate words of one meaning by commas: 电脑, 计算机",
            )
        for word in words:
            others = found.setdefault(word.casefold(), [])
            others += [other for other in words if other != word and other not in others]
    if not found:
        raise InputError(f"{path} has no words", fix="Write lines such as: 电脑, 计算机")
    return found


def _is_needed(word: str) -> bool:
    return word in _ASKING or word.startswith(NEGATIONS)


class Words:
    """Changes the words of a text, by a table of synonyms."""

    def __init__(self, synonyms: Mapping[str, list[str]]):
        self._synonyms = synonyms
        self._chinese = tuple(word for word in synonyms if not word.isascii())

    def synonym(self, text: str, rng: Random, rate: float) -> str:
        """Replace words by synonyms."""
        tokens, words = self._cut(text)
        known = [at for at in words if tokens[at].casefold() in self._synonyms]
        for at in chosen(known, rng, rate * len(words) / max(len(known), 1)):
            word = tokens[at]
            other = rng.choice(self._synonyms[word.casefold()])
            tokens[at] = other[0].upper() + other[1:] if word[0].isupper() else other
        return "".join(tokens)

    def swap(self, text: str, rng: Random, rate: float) -> str:
        """Let words swap their places with others."""
        tokens, words = self._cut(text)
        for at in chosen(words, rng, rate):
            drawn = rng.sample(words, min(len(words), _DRAWN))
            other = next((x for x in drawn if tokens[x] != tokens[at]), at)
            tokens[at], tokens[other] = tokens[other], tokens[at]
        return "".join(tokens)

    def delete(self, text: str, rng: Random, rate: float) -> str:
        """Leave words out, but no negation and no question word."""
        tokens, words = self._cut(text)
        if len(words) < 2:
            return text
        spare = [at for at in words if not _is_needed(tokens[at].casefold())]
        for at in chosen(spare, rng, rate):
            tokens[at] = ""
            if tokens[at + 1 : at + 2] == [" "]:
                tokens[at + 1] = ""
            elif at and tokens[at - 1] == " ":
                tokens[at - 1] = ""
        return "".join(tokens).strip()

    def _cut(self, text: str) -> tuple[list[str], list[int]]:
        """Return the tokens of a text, and the places of the words that may be changed."""
        tokens: list[str] = []
        words: list[int] = []
        for piece, free in pieces(text):
            for token in self._tokens(piece) if free else [piece]:
                if free and token[0].isalpha():
                    words.append(len(tokens))
                tokens.append(token)
        return tokens, words

    def _tokens(self, piece: str) -> Iterable[str]:
        for token in _TOKEN.findall(piece):
            if has_chinese(token[0]):
                yield from _tokenizer(self._chinese).cut(token)
            else:
                yield token


@cache
def _tokenizer(words: tuple[str, ...]) -> Any:
    """Return a tokenizer of jieba that knows these words, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel(60)  # nothing on stderr
    found = jieba.Tokenizer()
    for word in words:
        found.add_word(word)
    return found
