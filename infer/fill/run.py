"""What `python -m infer.fill` does once its flags are parsed."""

from __future__ import annotations

from dataclasses import dataclass

from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.errors import UsageError
from glm2_jax.text.prompt import MASKS, build_prompt
from infer.console import displayed, print_json
from infer.engine.answer import Completion
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.options import SamplingFlags
from infer.startup import note_demo_model, open_engine


@dataclass(frozen=True)
class Settings:
    """The flags of the command."""

    choice: ModelChoice
    options: EngineOptions
    sampling: SamplingFlags
    prompt: str
    json: bool


@dataclass(frozen=True)
class Filled:
    """A text whose blanks are filled, and the answer to each blank, from left to right."""

    text: str
    answers: tuple[Completion, ...]


def run(settings: Settings) -> int:
    """Fill the blanks of the prompt and print the text; returns the exit code."""
    note_demo_model(settings.choice)
    engine = open_engine(settings.choice, settings.options)
    text = settings.prompt
    if text.strip() and not MASKS.search(text):
        text += "[gMASK]" if "[gMASK]" in engine.tokenizer.special else "[MASK]"
        note(f"the prompt has no blank: continuing it, as if it ended in {MASKS.findall(text)[0]}")
    filled = fill(engine, text, settings.sampling.params(engine.written.preset_of))
    for number, answer in enumerate(filled.answers, 1):
        if answer.finish_reason == "length":
            note(f"the answer to blank {number} was cut off (--max-new-tokens, --max-length)")
    if settings.json:
        answers = [
            {"text": one.text.strip(), "finish_reason": one.finish_reason,
             "output_ids": list(one.output_ids)}
            for one in filled.answers
        ]  # fmt: skip
        print_json({"prompt": settings.prompt, "text": filled.text, "answers": answers})
    else:
        print(displayed(filled.text), flush=True)
    return 0


def fill(engine: Engine, text: str, sampling: SamplingParams) -> Filled:
    """Fill the blanks of a text one after another, from left to right.

    The model finds the k-th blank by the k-th start id, so each prompt is the one before with its
    answer and another start id. It is prefilled from its beginning: the context is
    bidirectional.

    Raises:
        UsageError: the model's template fills no blanks.
        InputError: masks of several kinds, no text, or no room for an answer.
    """
    if not engine.written.fills:
        raise UsageError(
            f"a {engine.config.family} model fills no blanks",
            f"Its template here is {engine.template}.",
            "Name a GLM base model, for example --model THUDM/glm-large-chinese.",
        )
    ids = build_prompt(engine.tokenizer, engine.template, text)
    start, answers = ids[-1], []
    for _ in MASKS.findall(text):
        if answers:
            ids = [*ids, *answers[-1].output_ids, start]
        answers.extend(engine.complete([ids], sampling))
    left = iter(answers)
    filled = MASKS.sub(lambda _: next(left).text.strip(), text)
    return Filled(filled, tuple(answers))
