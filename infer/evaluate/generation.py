"""`--task generation`: answers to questions, scored against the labels, and files of answers
(`--predictions`): JSON lines, as the official script writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from glm2_jax.cli.files import cannot_write_file, real_path, replace_file, require_file_place
from glm2_jax.cli.interrupt import always
from glm2_jax.cli.messages import Progress, note
from glm2_jax.datasets.encode import Encoder
from glm2_jax.datasets.rows import parse_conversation, read_rows
from glm2_jax.errors import InputError, UsageError
from glm2_jax.extras import pip_install
from glm2_jax.processes import join
from infer.engine.answer import Completion, Message
from infer.engine.params import SamplingParams
from infer.evaluate.rows import BUNDLED, BadRows, data_file
from infer.startup import note_demo_model, open_engine

if TYPE_CHECKING:
    from infer.engine.engine import Engine
    from infer.evaluate.options import Settings


def run(settings: Settings) -> dict[str, Any]:
    """Answer and score, or score an existing file; returns the figures."""
    metrics = open_metrics("--task generation")
    bad = BadRows(settings.max_bad)
    source = {"predictions": settings.predictions}
    if settings.predictions and not settings.data:
        labels, predictions = read_predictions(settings.predictions, bad)
    else:
        labels, predictions = _generate(settings, bad)
        source = {"data": settings.data or BUNDLED, **source}
    return {**source, "bad_rows": bad.count, **metrics.score(predictions, labels)}


def open_metrics(user: str) -> ModuleType:
    """Return the module of the metrics; UsageError where `user`, which needs it, cannot have it."""
    try:
        from infer.evaluate import metrics
    except ImportError as error:
        raise UsageError(
            f"{error.name} is not installed, and {user} needs it",
            str(error),
            pip_install("evaluate"),
        ) from None
    return metrics


def _generate(settings: Settings, bad: BadRows) -> tuple[list[str], list[str]]:
    sampling = sampling_of(settings)
    check_output(settings.predictions, settings.data, settings.overwrite)
    parse = partial(parse_conversation, fmt=settings.format)
    found = bad.keep(read_rows(data_file(settings.data)), parse)
    rows = [(where, messages) for where, messages in found if messages[-1].get("loss", True)]
    if marked := len(found) - len(rows):
        note(f"rows left out, because their answers are marked as not to be learned: {marked}")
    bad.check(len(rows))
    note_demo_model(settings.choice)
    batch, contents = settings.batch_size, {"questions and answers": [row for _, row in rows]}
    engine = open_engine(settings.choice, settings.options, rows=batch, contents=contents)
    asked = bad.keep(rows, partial(ask, engine))
    bad.check(len(asked))
    prompts, questions, labels = map(list, zip(*(row for _, row in asked), strict=True))
    texts, clean = [""] * len(asked), engine.written.chat
    with predictions_file(settings.predictions) as write:
        for at, text in answers(engine, prompts, sampling, batch, clean=clean):
            texts[at] = text
            write(at, {"prompt": questions[at], "labels": labels[at], "predict": text})
    return labels, texts


def sampling_of(settings: Settings) -> SamplingParams:
    """Return how answers are drawn."""
    return SamplingParams(
        temperature=settings.temperature, top_p=settings.top_p, top_k=0, seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
    )  # fmt: skip


def ask(engine: Engine, messages: Sequence[dict[str, Any]]) -> tuple[list[int], str, str]:
    """Return the ids of the question to the last answer of a conversation, its text, and that
    answer in the form of a generated one; InputError as `Encoder.question` and `checked`."""
    ids, wanted = Encoder(engine.tokenizer, engine.template).question(messages), messages[-1]
    question = messages[0 if engine.written.fills else -2]
    label = Message("assistant", wanted.get("metadata") or "", wanted["content"]).text
    return checked(engine, ids), question["content"], label


def checked(engine: Engine, ids: list[int]) -> list[int]:
    """Return the ids of a prompt; InputError if they leave no room for an answer."""
    if len(ids) >= engine.max_length:
        raise InputError(
            f"The prompt is too long: {len(ids)} tokens.",
            f"Prompt and answer together may have {engine.max_length}.",
        )
    return ids


def answers(
    engine: Engine, prompts: Sequence[list[int]], sampling: SamplingParams, batch: int, clean: bool
) -> Iterator[tuple[int, str]]:
    """Yield the index and the answer of each prompt, as `completions`."""
    found = completions(engine, prompts, sampling, batch, clean)
    return ((number, one.text) for number, one in found)


def completions(
    engine: Engine, prompts: Sequence[list[int]], sampling: SamplingParams, batch: int, clean: bool
) -> Iterator[tuple[int, Completion]]:
    """Yield the index and the completion of each prompt, `batch` of them at a time and the longest
    first; `clean`: as in `Engine.stream`."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    with Progress("answers", len(prompts)) as bar:
        for first in range(0, len(order), batch):
            numbers = order[first : first + batch]
            ids = [prompts[number] for number in numbers]
            found = engine.complete(ids, sampling, row_ids=numbers, clean=clean)
            bar.start += max(one.stats.compile_s for one in found)  # not part of the rate
            bar(first + len(numbers))
            yield from zip(numbers, found, strict=True)


def read_predictions(path: str, bad: BadRows) -> tuple[list[str], list[str]]:
    """Return the labels and the predictions of a file."""
    if not Path(path).exists():
        raise InputError(
            f"{path} not found, there is nothing to score",
            "Without --data, --predictions is a file of answers that is read.",
            "To write it, name the questions: --data F.",
        )

    def parse(row: Any) -> tuple[str, str]:
        row = row if isinstance(row, dict) else {}
        label, text = row.get("labels"), row.get("predict")
        if not isinstance(label, str) or not isinstance(text, str) or not label.strip():
            raise InputError("no prediction", 'write {"labels": "...", "predict": "..."}')
        return label, text

    found = bad.keep(read_rows(path), parse)
    bad.check(len(found))
    return [label for _, (label, _) in found], [text for _, (_, text) in found]


def check_output(predictions: str | None, data: str | None, overwrite: bool) -> None:
    """Raise before any work if `--predictions` cannot be written."""
    if predictions is None or not join.is_first():
        return
    path = require_file_place(predictions)
    places = path, _partial(path)
    if data is not None and real_path(data) in places:
        raise UsageError(f"--predictions and --data are both {data}", fix="Name another file.")
    for place in places:
        if place.exists() and place.stat().st_size and not overwrite:
            raise UsageError(
                f"{place} exists already",
                "It holds the answers of another run, and only --overwrite replaces them.",
                "Name another file, or add --overwrite. Without --data it is read and scored.",
            )


def _partial(path: Path) -> Path:
    """Return the place of a file until it is complete."""
    return path.with_name(path.name + ".partial")


@contextmanager
def predictions_file(named: str | None) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """Give a function that writes a row: its number and an object.

    Each row is written to F.partial at once; when all are there, F gets them in the order of their
    numbers. After an interruption F.partial stays. Without a name, and in all but the first of
    several processes, nothing is written.
    """
    if named is None or not join.is_first():
        yield lambda number, row: None
        return
    path = real_path(named)
    partial, lines = _partial(path), dict[int, bytes]()

    def keep_partial() -> None:
        if lines and partial.exists():
            note(f"incomplete: {len(lines)} answers are in {partial}, which can be scored")
        else:
            partial.unlink(missing_ok=True)

    with always(keep_partial):
        with partial.open("wb", buffering=0) as file:

            def write(number: int, row: dict[str, Any]) -> None:
                line = left = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                complete = file.tell()
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError as error:
                    file.truncate(complete)
                    raise cannot_write_file(partial, error) from error
                lines[number] = line

            yield write
        replace_file(path, b"".join(lines[number] for number in sorted(lines)))
        partial.unlink()
    note(f"predictions are in {named}")
