"""`--judge`: a model as one more rater of a sheet.

It is asked about each item and criterion, and its most likely token is its mark. For two answers it
is asked twice, with the sides swapped: an answer is better only if it is preferred on both sides,
otherwise they are the same. So a model that always likes the first one prefers nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from glm2_jax.cli.messages import note
from glm2_jax.errors import InputError
from glm2_jax.text.chinese import CHINESE
from glm2_jax.text.prompt import with_blank
from infer.evaluate.choice import letter_ids, letter_logits
from infer.evaluate.generation import checked
from infer.evaluate.rate.sheet import AB, CRITERIA, Item, Sheet

if TYPE_CHECKING:
    from infer.engine.engine import Engine

_SIDES, _SCORES = ("A", "B"), ("1", "2", "3", "4", "5")
_BETTER = {1: "A", -1: "B", 0: "tie"}
_CHINESE: dict[str, str] = dict(
    zip(CRITERIA, ("可读性", "流畅度", "准确性", "有用性"), strict=True)
)


def judge(engine: Engine, sheet: Sheet, batch: int) -> dict[str, dict[str, Any]]:
    """Return the marks of each item that fits, as the page of the sheet writes them."""
    asked: list[tuple[Item, str, int]] = []  # item, criterion, -1 = sides swapped
    prompts = []
    letters = _SIDES if sheet.scale == AB else _SCORES
    common, ids = letter_ids(engine, letters)
    for item in sheet.items:
        texts = [
            (name, turn, question(item, name, turn))
            for name in CRITERIA
            for turn in ((1, -1) if sheet.scale == AB else (1,))
        ]
        try:
            rows = [[*_prompt(engine, text), *common] for _, _, text in texts]
        except InputError as error:
            note(f"item {item.id} is left out: {error.cause}")
            continue
        prompts += rows
        asked += [(item, name, turn) for name, turn, _ in texts]
    if not prompts:
        raise InputError("no item can be rated", "All of them are too long for the model.")
    logits = letter_logits(engine, prompts, ids, batch)
    marks: dict[str, dict[str, Any]] = {}
    for (item, name, turn), row in zip(asked, logits, strict=True):
        if sheet.scale == AB:
            mark: Any = _BETTER[turn * int(np.sign(row[0] - row[1]))]
            if mark != marks.get(item.id, {}).get(name, mark):
                mark = "tie"
        else:
            mark = int(row.argmax()) + 1
        marks.setdefault(item.id, {})[name] = mark
    return marks


def question(item: Item, criterion: str, turn: int = 1) -> str:
    """Return what a model is asked about an item, in the language of its prompt."""
    answers = item.answers[::turn]
    if CHINESE.search(item.prompt):
        name = _CHINESE[criterion]
        shown = "\n\n".join(
            f"【回答 {side}】\n{text}" for side, text in zip(_SIDES, answers, strict=False)
        )
        ask = f"就{name}而言，哪个回答更好？只回答 A 或 B。"
        ask = ask if len(answers) == 2 else f"请为回答的{name}打分，1 最差，5 最好。只回答数字。"
        return f"【问题】\n{item.prompt}\n\n{shown}\n\n{ask}\n答案："
    shown = "\n\n".join(
        f"[Answer {side}]\n{text}" for side, text in zip(_SIDES, answers, strict=False)
    )
    ask = f"Which answer is better in {criterion}? Reply with A or B only."
    if len(answers) == 1:
        ask = f"Rate the {criterion} of the answer from 1 (worst) to 5 (best). Reply with a digit."
    return f"[Question]\n{item.prompt}\n\n{shown}\n\n{ask}\nAnswer:"


def _prompt(engine: Engine, text: str) -> list[int]:
    text = with_blank(engine.tokenizer, engine.template, text, "[MASK]")
    return checked(engine, engine.build_prompt(text))
