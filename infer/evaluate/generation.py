"""Generated answers beside those that are wanted, and files of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm2_jax.cli.files import real_path
from glm2_jax.cli.interrupt import always
from glm2_jax.cli.messages import Progress, note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import InputError, UsageError
from glm2_jax.processes import join
from infer.datasets.encode import Encoder
from infer.engine.answer import Message
from infer.engine.params import SamplingParams
from infer.evaluate import metrics
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

_AHEAD = 16  # batches of rows that are sorted together
_PARTIAL = ".partial"  # of a --predictions file, until all answers are there


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Answers and scores, or scores an existing file; returns the figures."""
    metrics.check_packages()
    bad = BadRows(args.max_bad)
    if args.predictions and not args.data:
        if not Path(args.predictions).exists():
            raise InputError(
                f"there is no {args.predictions} to score",
                "Without --data, --predictions is a file of answers that is read.",
                "To make it, name the questions: --data F.",
            )
        labels, predictions = read_predictions(args.predictions, bad)
        source = {"predictions": args.predictions}
    else:
        source = {"data": args.data or BUNDLED, "predictions": args.predictions}
        labels, predictions = _generate(args, bad)
    return {**source, "bad_rows": bad.count, **metrics.score(predictions, labels)}


def read_predictions(path: str, bad: BadRows) -> tuple[list[str], list[str]]:
    """What was wanted and what was answered, of a file such as the official script writes."""
    found = bad.keep(read_rows(path), _prediction)
    bad.check(len(found))
    labels, predictions = zip(*found, strict=True)
    return list(labels), list(predictions)


def _prediction(where: str, row: Any) -> tuple[str, str]:
    label, text = (row.get("labels"), row.get("predict")) if isinstance(row, dict) else (None, None)
    if not isinstance(label, str) or not isinstance(text, str):
        raise InputError("no prediction", 'write {"labels": "...", "predict": "..."}')
    if not label.strip():
        raise InputError("labels is empty")
    return label, text


def sampling_params(args: argparse.Namespace, *, greedy: bool = False) -> SamplingParams:
    """How answers are drawn; UsageError for a bad value."""
    return SamplingParams(
        temperature=0.0 if greedy else args.temperature,
        top_p=args.top_p,
        top_k=0,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
    )


def _generate(args: argparse.Namespace, bad: BadRows) -> tuple[list[str], list[str]]:
    sampling = sampling_params(args)
    check_output(args)

    def parse(where: str, row: Any) -> Conversation:
        return parse_conversation(where, row, args.format)

    found = bad.keep(read_rows(data_file(args.data)), parse)
    rows = [row for row in found if row.messages[-1].get("loss", True)]
    if marked := len(found) - len(rows):
        note(f"rows left out, because their answers are marked as not to be learned: {marked}")
    bad.check(len(rows))
    note_demo_model(from_flags(ModelChoice, args))
    engine = open_engine(
        from_flags(ModelChoice, args),
        from_flags(EngineOptions, args),
        contents={"questions and answers": unplaced(rows)},
    )
    encoder = Encoder(engine.tokenizer, engine.template)

    def prompt(where: str, row: Conversation) -> tuple[Conversation, list[int]]:
        return row, checked(engine, encoder.question(row.messages))

    asked = bad.keep(((row.where, row) for row in rows), prompt)
    bad.check(len(asked))
    texts = [""] * len(asked)
    prompts, clean = [ids for _, ids in asked], engine.template != "raw"
    found = answers(engine, prompts, sampling, args.batch_size, clean=clean)
    labels = [_label(row) for row, _ in asked]
    with predictions_file(args) as write:
        for at, text in found:
            texts[at], question = text, asked[at][0].messages[-2]
            write(at, {"prompt": question["content"], "labels": labels[at], "predict": text})
    return labels, texts


def _label(row: Conversation) -> str:
    """The answer that is wanted, in the form that a generated one has."""
    wanted = row.messages[-1]
    return Message("assistant", wanted.get("metadata") or "", wanted["content"]).text


def checked(engine: Engine, ids: list[int]) -> list[int]:
    """The ids of a prompt; InputError if they leave no room for an answer."""
    if len(ids) >= engine.max_length:
        raise InputError(
            "the prompt is too long",
            f"{len(ids)} tokens; prompt and answer together may have {engine.max_length}",
        )
    return ids


def answers(
    engine: Engine,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    batch: int,
    *,
    clean: bool,
) -> Iterator[tuple[int, str]]:
    """(index, answer) of all prompts, as they come; those of like length are answered together.

    Args:
      clean: pass them through `clean_response`.
    """
    left = iter(enumerate(prompts))
    done = 0
    with Progress("answers", len(prompts)) as bar:
        while group := list(islice(left, _AHEAD * batch)):
            group.sort(key=lambda row: -len(row[1]))
            for first in range(0, len(group), batch):
                numbers, ids = zip(*group[first : first + batch], strict=True)
                completions = engine.complete(ids, sampling, row_ids=numbers, clean=clean)
                done += len(ids)
                bar.start += max(
                    one.stats.compile_s for one in completions
                )  # says nothing of the time left
                bar(done)
                yield from zip(numbers, (one.text for one in completions), strict=True)


def check_output(args: argparse.Namespace) -> None:
    """Raises before any work if `--predictions` cannot be written."""
    if args.predictions is None or not join.is_first():
        return
    path = Path(args.predictions)
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        raise InputError(f"cannot write {path}", "it is no file, or its folder is not there")
    target, partial = _places(args)
    if args.data is not None and real_path(args.data) in (target, partial):
        raise UsageError(f"--predictions and --data are both {args.data}", fix="Name another file.")
    if path.exists() and not args.overwrite:
        raise UsageError(
            f"{path} is there already",
            fix="Name another file, or give --overwrite. Without --data it is read and scored.",
        )
    if partial.exists() and partial.stat().st_size and not args.overwrite:
        raise UsageError(
            f"{partial} is there already",
            "It holds the answers of a run that was stopped; this one would begin anew.",
            "Move it away, or give --overwrite to replace it.",
        )


def _places(args: argparse.Namespace) -> tuple[Path, Path]:
    """Where `--predictions` is in the end, behind any links, and where until then."""
    path = real_path(args.predictions)
    return path, path.with_name(path.name + _PARTIAL)


@contextmanager
def predictions_file(args: argparse.Namespace) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """Gives a function that writes a row (number, object); without `--predictions`, and in all but
    the first of several processes, it does nothing.

    Each row is at once a line of F.partial. At the end F gets them in the order of their numbers.
    Where that is not reached, also because of a signal, F.partial stays, and is told.
    """
    if args.predictions is None or not join.is_first():
        yield lambda number, row: None
        return
    path, partial = _places(args)
    lines: dict[int, str] = {}

    def tell() -> None:
        if lines and partial.exists():
            note(f"not complete: {len(lines)} answers are in {partial}, to be scored as they are")
        else:
            partial.unlink(missing_ok=True)

    ordered = path.with_name(path.name + ".ordered")
    with always(tell):
        with partial.open("wb", buffering=0) as file:

            def write(number: int, row: dict[str, Any]) -> None:
                line = json.dumps(row, ensure_ascii=False) + "\n"
                whole, left = file.tell(), line.encode()
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError as error:
                    file.truncate(whole)
                    raise _cannot_write(partial, error) from error
                lines[number] = line

            yield write
        try:
            text = "".join(lines[number] for number in sorted(lines))
            ordered.write_text(text, encoding="utf-8")
            ordered.replace(path)
        except OSError as error:
            ordered.unlink(missing_ok=True)
            raise _cannot_write(path, error) from error
        partial.unlink()
    note(f"predictions are in {args.predictions}")


def _cannot_write(path: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(f"cannot write {path}", reason, "Free some space, or name another file.")
