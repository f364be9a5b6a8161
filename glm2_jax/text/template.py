"""How the prompts of each family are written: one row of a table per template. Free of jax."""

import dataclasses
from collections.abc import Sequence

from glm2_jax.choices import TEMPLATES as NAMES
from glm2_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Rounds:
    """A conversation as one text of numbered rounds, of which the last has no answer yet."""

    gap: str  # after the number, the question, and the answer
    first: int  # number of the first round
    bare: bool  # a question without history is written as it is

    def text(self, query: str, turns: Sequence[tuple[str, str]] = ()) -> str:
        """Return the text of a question after the (question, answer) `turns`."""
        if self.bare and not turns:
            return query
        before = [self.round(n, q) + a for n, (q, a) in enumerate(turns)]
        return self.gap.join([*before, self.round(len(turns), query)])

    def round(self, index: int, question: str) -> str:
        """Return the text of a round up to its answer; the first one has the index 0."""
        return f"[Round {self.first + index}]{self.gap}问：{question}{self.gap}答："


@dataclasses.dataclass(frozen=True)
class Template:
    """How prompts are written, and how answers are read.

    A template has `roles`, or `rounds`, or neither: then it takes one text.
    """

    families: tuple[str, ...]  # the models that it suits
    rounds: Rounds | None = None
    roles: bool = False  # messages, each after the id of its role; an answer is read as messages
    calls: str | None = None  # how the model writes tool calls: as "python" code, or "json"
    fills: bool = False  # the text has masks, which become their ids
    wide: bool = False  # punctuation next to Chinese characters is shown in its full-width form
    learns_start: bool = False  # training also learns the last id of the prompt
    preset: str = "official"  # of `infer.engine.params.PRESETS`: how the published code samples

    @property
    def chat(self) -> bool:
        """Whether it takes a conversation, and answers are cleaned as the chat code does."""
        return self.roles or self.rounds is not None

    def preset_of(self, asked: str) -> str:
        """Return the preset that a name asks for: "official" is what the published code does."""
        return self.preset if asked == "official" else asked


_FIRST_THREE = ("chatglm2", "chatglm3", "codegeex2")
CHATGLM2_ROUNDS = Rounds(gap="\n\n", first=1, bare=False)

TEMPLATES = {
    "chatglm2": Template(_FIRST_THREE, rounds=CHATGLM2_ROUNDS),
    "chatglm3": Template(("chatglm3",), roles=True, calls="python"),
    "glm4": Template(("glm4", "glm4-0414"), roles=True, calls="json"),
    "chatglm": Template(
        ("chatglm",), rounds=Rounds(gap="\n", first=0, bare=True), wide=True, learns_start=True,
        preset="api",
    ),
    "fill": Template(("glm",), fills=True, preset="greedy"),
    "raw": Template((*_FIRST_THREE, "glm4", "glm4-0414", "chatglm", "glm")),
}  # fmt: skip
"""By `glm2_jax.choices.TEMPLATES`."""


def find_template(name: str) -> Template:
    """Return the template of a name; UsageError if there is none."""
    if name not in TEMPLATES:
        raise UsageError(f"unknown template {name!r}", fix=f"Known: {', '.join(NAMES)}.")
    return TEMPLATES[name]
