"""`--task generation`: answers to questions, scored against the labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from glm2_jax.cli.messages import Progress, note
from glm2_jax.errors import InputError, UsageError
from infer.datasets.encode import Encoder
from infer.engine.answer import Message
from infer.engine.params import SamplingParams
from infer.evaluate.predictions import check_output, predictions_file, read_predictions
from infer.evaluate.rows import (
    BUNDLED,
    BadRows,
    Conversation,
    data_file,
    parse_conversation,
    read_rows,
    unplaced,
)
from infer.startup import note_demo_model, open_engine

if TYPE_CHECKING:
    from infer.engine.engine import Engine
    from infer.evaluate.run import Settings


def run(settings: Settings) -> dict[str, Any]:
    """Answer and score, or score an existing file; returns the figures."""
    try:
        from infer.evaluate import metrics
    except ImportError as error:
        raise UsageError(
            f"{error.name} is not installed, and --task generation needs it",
            str(error),
            "pip install 'glm2-jax[evaluate]'",
        ) from None
    bad = BadRows(settings.max_bad)
    source = {"predictions": settings.predictions}
    if settings.predictions and not settings.data:
        labels, predictions = read_predictions(settings.predictions, bad)
    else:
        labels, predictions = _generate(settings, bad)
        source = {"data": settings.data or BUNDLED, **source}
    return {**source, "bad_rows": bad.count, **metrics.score(predictions, labels)}


def _generate(settings: Settings, bad: BadRows) -> tuple[list[str], list[str]]:
    sampling = SamplingParams(
        temperature=settings.temperature, top_p=settings.top_p, top_k=0, seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
    )  # fmt: skip
    check_output(settings.predictions, settings.data, settings.overwrite)
    parse = partial(parse_conversation, fmt=settings.format)
    found = bad.keep(read_rows(data_file(settings.data)), parse)
    rows = [row for row in found if row.messages[-1].get("loss", True)]
    if marked := len(found) - len(rows):
        note(f"rows left out, because their answers are marked as not to be learned: {marked}")
    bad.check(len(rows))
    note_demo_model(settings.choice)
    batch, contents = settings.batch_size, {"questions and answers": unplaced(rows)}
    engine = open_engine(settings.choice, settings.options, rows=batch, contents=contents)
    encoder = Encoder(engine.tokenizer, engine.template)

    def prompt(where: str, row: Conversation) -> tuple[Conversation, list[int]]:
        return row, checked(engine, encoder.question(row.messages))

    asked = bad.keep(((row.where, row) for row in rows), prompt)
    bad.check(len(asked))
    labels, texts = [_label(row) for row, _ in asked], [""] * len(asked)
    prompts, clean = [ids for _, ids in asked], engine.template != "raw"
    with predictions_file(settings.predictions) as write:
        for at, text in answers(engine, prompts, sampling, batch, clean=clean):
            texts[at], question = text, asked[at][0].messages[-2]
            write(at, {"prompt": question["content"], "labels": labels[at], "predict": text})
    return labels, texts


def _label(row: Conversation) -> str:
    """Return the answer of a row in the form of a generated one."""
    wanted = row.messages[-1]
    return Message("assistant", wanted.get("metadata") or "", wanted["content"]).text


def checked(engine: Engine, ids: list[int]) -> list[int]:
    """Return the ids of a prompt; InputError if they leave no room for an answer."""
    if len(ids) >= engine.max_length:
        raise InputError(
            "the prompt is too long",
            f"{len(ids)} tokens; prompt and answer together may have {engine.max_length}",
        )
    return ids


def answers(
    engine: Engine, prompts: Sequence[list[int]], sampling: SamplingParams, batch: int, clean: bool
) -> Iterator[tuple[int, str]]:
    """Yield the index and the answer of each prompt, `batch` of them at a time and the longest
    first; `clean` applies `clean_response`."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    with Progress("answers", len(prompts)) as bar:
        for first in range(0, len(order), batch):
            numbers = order[first : first + batch]
            ids = [prompts[number] for number in numbers]
            completions = engine.complete(ids, sampling, row_ids=numbers, clean=clean)
            bar.start += max(one.stats.compile_s for one in completions)  # not part of the rate
            bar(first + len(numbers))
            yield from zip(numbers, (one.text for one in completions), strict=True)
