"""New wordings by a model: paraphrases, and translations into the other language and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from glm2_jax.errors import InputError
from glm2_jax.text.prompt import with_blank
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.evaluate.generation import checked, completions
from train.augment.options import PARAPHRASE
from train.data.language import has_chinese

_QUOTES = ("“”", '""', "「」", "『』")
# In Chinese, in English.
_PARAPHRASE = (
    "换一种说法改写下面这段话，意思不变，只输出改写后的内容。\n\n{}",
    "Rewrite the text below in other words, with the same meaning. Output only the new text.\n\n{}",
)
_TRANSLATE = (
    "把下面这段话翻译成英文，只输出译文。\n\n{}",
    "Translate the text below into Chinese. Output only the translation.\n\n{}",
)


class Written(NamedTuple):
    """What a model wrote, or why there is nothing."""

    text: str
    reason: str = ""


def write(
    engine: Engine, method: str, texts: Sequence[str], sampling: SamplingParams, batch: int
) -> list[Written]:
    """Return a new wording of each text by a method of `options.WITH_MODEL`. A text that is given
    again gets its own random numbers."""
    if method == PARAPHRASE:
        return _ask(engine, _PARAPHRASE, texts, sampling, batch)
    there = _ask(engine, _TRANSLATE, texts, sampling, batch)
    back = _ask(engine, _TRANSLATE, [one.text for one in there], sampling, batch)
    return [one if one.reason else other for one, other in zip(there, back, strict=True)]


def _ask(
    engine: Engine, prompts: tuple[str, str], texts: Sequence[str], sampling: SamplingParams,
    batch: int,
) -> list[Written]:  # fmt: skip
    found = [Written("", "empty")] * len(texts)
    asked: list[int] = []
    ids: list[list[int]] = []
    for number, text in enumerate(texts):
        if not text:
            continue
        prompt = prompts[0 if has_chinese(text) else 1].replace("{}", text)
        prompt = with_blank(engine.tokenizer, engine.template, prompt, "[MASK]")
        try:
            ids.append(checked(engine, engine.build_prompt(prompt)))
            asked.append(number)
        except InputError:
            found[number] = Written("", "too long")
    for at, one in completions(engine, ids, sampling, batch, clean=engine.written.chat):
        number, reason = asked[at], "cut off" if one.finish_reason == "length" else ""
        found[number] = Written(_plain(one.text, texts[number]), reason)
    return found


def _plain(text: str, old: str) -> str:
    """Return a text without blanks around it, and without quotation marks that the old one does not
    have."""
    text = text.strip()
    quoted = len(text) > 2 and text[0] + text[-1] in _QUOTES and old[:1] != text[0]
    return text[1:-1].strip() if quoted else text
