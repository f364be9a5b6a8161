"""Other wordings around a question: "{}" of a template stands for it. Imports no jax."""

from __future__ import annotations

from pathlib import Path
from random import Random

from glm2_jax.cli.text_input import read_utf8
from glm2_jax.errors import InputError
from train.data.language import has_chinese, units

TEMPLATES = Path(__file__).with_name("templates.txt")
PLACE = "{}"


class Templates:
    """The templates of a file, one a line; a # begins a comment line.

    One with Chinese characters is for questions that have some, one with Latin words alone for the
    others, and one without words for all. InputError: a line without "{}" or with several, or
    nothing but it.
    """

    def __init__(self, path: str | Path = TEMPLATES):
        self._chinese: list[str] = []
        self._others: list[str] = []
        for number, line in enumerate(read_utf8(path).splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            if line.count(PLACE) != 1 or line.strip() == PLACE:
                raise InputError(
                    f"{path}:{number}: a template has {PLACE} once, and more than that",
                    f"It is {line[:60]!r}.",
                    f"Write {PLACE} where the question goes: 请问，{PLACE}",
                )
            template = line.replace("\\n", "\n")
            if has_chinese(line) or not units(line):
                self._chinese.append(template)
            if not has_chinese(line):
                self._others.append(template)
        if not self._chinese and not self._others:
            raise InputError(f"{path} has no templates", fix=f"Write lines such as: 请问，{PLACE}")

    def wrap(self, text: str, rng: Random, rate: float) -> str:
        """Return a text in one of the templates of its language; itself where there is none."""
        found = self._chinese if has_chinese(text) else self._others
        return rng.choice(found).replace(PLACE, text) if found else text
