"""What `python -m infer.fill` does once its flags are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from convert.loading.folder import read_architecture
from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.errors import InputError, UsageError
from glm2_jax.text.prompt import MASKS, build_prompt, mask_of, with_blank
from glm2_jax.text.template import find_template
from infer.console import displayed, print_json
from infer.engine.answer import Completion
from infer.engine.engine import Engine
from infer.engine.load import demo_folder
from infer.engine.params import SamplingParams
from infer.engine.reader import score_answers
from infer.options import PromptFlags, SamplingFlags
from infer.requests.exchange import note_blanks
from infer.requests.request import Request
from infer.startup import find_choice, note_demo_model, open_engine


@dataclass(frozen=True)
class Settings:
    """The flags of the command."""

    choice: ModelChoice
    options: EngineOptions
    sampling: SamplingFlags
    asked: PromptFlags
    json: bool
    choices: list[str] | None = None


@dataclass(frozen=True)
class Filled:
    """A text whose blanks are filled, and the answer to each blank, from left to right."""

    text: str
    answers: tuple[Completion, ...]


class Choice(NamedTuple):
    """One of the answers that may fill a blank."""

    text: str
    log_prob: float  # sum over its tokens
    output_ids: list[int]


def run(settings: Settings) -> int:
    """Fill the blanks of the prompt and print the text; returns the exit code."""
    note_demo_model(settings.choice)
    prompt = Request(settings.asked.read()).prompt
    check_text(prompt, settings.choices)  # before the model is loaded: errors come at once
    engine = open_engine(check_model(settings.choice), settings.options)
    note_blanks(engine, prompt)
    text = with_blank(engine.tokenizer, engine.template, prompt)
    find = _filled if settings.choices is None else _chosen
    found = {"prompt": prompt, **find(engine, text, settings)}
    if settings.json:
        print_json(found)
    else:
        print(displayed(found["text"]), flush=True)
    return 0


def check_model(choice: ModelChoice) -> ModelChoice:
    """Return the choice with the model's folder as its path; UsageError: it fills no blanks."""
    choice = find_choice(choice)
    found = read_architecture(choice.path or demo_folder(), **choice.form)
    _check_template(found.config.family, found.template)
    return choice


def _check_template(family: str, template: str) -> None:
    if not find_template(template).fills:
        raise UsageError(
            f"A {family} model fills no blanks.",
            f"Its template here is {template}.",
            "Name a GLM base model, for example --model THUDM/glm-large-chinese.",
        )


def check_text(text: str, choices: Sequence[str] | None = None) -> None:
    """Raise InputError for blanks of several kinds; and with choices, for several blanks, or an
    empty choice."""
    mask_of(text)
    if choices is None:
        return
    if (blanks := len(MASKS.findall(text))) > 1:
        raise InputError(
            f"--choices needs a text with one blank, got {blanks}.",
            "Each choice is an answer to one blank.",
            "Write the other blanks out, or leave --choices out to fill all of them.",
        )
    for number, choice in enumerate(choices, 1):
        if not choice.strip():
            raise InputError(f"Choice {number} is empty.", fix="Write an answer, or leave it out.")


def _filled(engine: Engine, text: str, settings: Settings) -> dict[str, Any]:
    """Return what `--json` prints of a text that is filled."""
    filled = fill(engine, text, settings.sampling.params(engine.written.preset_of))
    for number, answer in enumerate(filled.answers, 1):
        if answer.finish_reason == "length":
            note(f"the answer to blank {number} was cut off (--max-new-tokens, --max-length)")
    answers = [
        {"text": one.text.strip(), "finish_reason": one.finish_reason,
         "output_ids": list(one.output_ids)}
        for one in filled.answers
    ]  # fmt: skip
    return {"text": filled.text, "answers": answers}


def _chosen(engine: Engine, text: str, settings: Settings) -> dict[str, Any]:
    """Return what `--json` prints of a text whose blank has choices."""
    sampling = settings.sampling.params(engine.written.preset_of)
    choices = choose(engine, text, settings.choices or (), sampling)
    ranked = sorted(range(len(choices)), key=lambda number: -choices[number].log_prob)
    for number in ranked:
        note(f"{choices[number].log_prob:10.3f}  {choices[number].text}")
    best = choices[ranked[0]].text.strip()
    return {
        "text": MASKS.sub(lambda _: best, text),
        "best": ranked[0],
        "choices": [choice._asdict() for choice in choices],
    }


def fill(engine: Engine, text: str, sampling: SamplingParams) -> Filled:
    """Fill the blanks of a text one after another, from left to right.

    The model finds the k-th blank by the k-th start id, so each prompt is the one before with its
    answer and another start id. It is prefilled from its beginning: the context is
    bidirectional.

    Raises:
        UsageError: the model's template fills no blanks.
        InputError: masks of several kinds, no text, or no room for an answer.
    """
    ids, limit = _prompt(engine, text, sampling)
    start, answers = ids[-1], []
    for number, _ in enumerate(MASKS.findall(text), 1):
        if answers:
            ids = [*ids, *answers[-1].output_ids, start]
        if len(ids) >= limit:
            raise _no_room(f"the answer to blank {number}", ids, limit)
        answers.extend(engine.complete([ids], sampling))
    left = iter(answers)
    filled = MASKS.sub(lambda _: next(left).text.strip(), text)
    return Filled(filled, tuple(answers))


def choose(
    engine: Engine, text: str, choices: Sequence[str], sampling: SamplingParams
) -> list[Choice]:
    """Score the answers that may fill the one blank of a text, as `check_text` accepts them, in the
    order given; of `sampling` only the maximal length counts.

    Raises:
        UsageError: the model's template fills no blanks.
        InputError: no text, or a choice that does not fit.
    """
    ids, limit = _prompt(engine, text, sampling)
    encoded = [engine.tokenizer.encode(choice) for choice in choices]
    for number, choice in enumerate(encoded, 1):
        if len(ids) + len(choice) > limit:
            raise _no_room(f"choice {number} (tokens: {len(choice)})", ids, limit)
    scores = score_answers(engine, ids, encoded)
    return [Choice(*one) for one in zip(choices, scores, encoded, strict=True)]


def _prompt(engine: Engine, text: str, sampling: SamplingParams) -> tuple[list[int], int]:
    """Return the ids of a text with blanks and of the start of the first answer, and how many ids
    it and its answers may have."""
    _check_template(engine.config.family, engine.template)
    limit = min(engine.max_length, sampling.max_length or engine.max_length)
    return build_prompt(engine.tokenizer, engine.template, text), limit


def _no_room(what: str, ids: Sequence[int], limit: int) -> InputError:
    return InputError(
        f"There is no room for {what} after {len(ids)} tokens.",
        f"Prompt and answer together may have {limit}.",
        "Shorten the text or the answers (--max-new-tokens), or raise --max-length as far as the "
        "model goes.",
    )
