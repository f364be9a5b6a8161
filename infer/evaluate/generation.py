"""Generated answers beside those that are wanted, and files of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from convert.cli import Progress, note
from glm2_jax.errors import InputError, UsageError
from infer.evaluate import metrics
from infer.evaluate.rows import (
    BUNDLED,
    BadRows,
    Pair,
    data_file,
    parse_pair,
    read_rows,
)
from infer.options import open_engine, say_which_model
from infer.params import SamplingParams

if TYPE_CHECKING:
    from infer.engine import Engine

_AHEAD = 16  # batches of rows that are sorted together, and then written in the file's order


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
    pairs = bad.keep(read_rows(data_file(args.data)), parse_pair)
    bad.check(len(pairs))
    say_which_model(args)
    engine = open_engine(args)

    def prompt(where: str, pair: Pair) -> tuple[Pair, list[int]]:
        ids = engine.build_prompt(pair.question, pair.history, pair.system)
        return pair, checked(engine, ids)

    asked = bad.keep(((pair.where, pair) for pair in pairs), prompt)
    bad.check(len(asked))
    texts = []
    prompts, clean = [ids for _, ids in asked], engine.template != "raw"
    found = answers(engine, prompts, sampling, args.batch_size, clean=clean)
    with Predictions(args) as file:
        for (pair, _), text in zip(asked, found, strict=True):
            texts.append(text)
            file.write({"prompt": pair.question, "labels": pair.answer, "predict": text})
    return [pair.answer for pair, _ in asked], texts


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
) -> Iterator[str]:
    """The answers to prompts, in their order; rows of like length are answered together.

    Args:
      clean: pass them through `clean_response`.
    """
    left = iter(enumerate(prompts))
    done = 0
    with Progress("answers", len(prompts)) as bar:
        while group := list(islice(left, _AHEAD * batch)):
            texts = {}
            group.sort(key=lambda row: -len(row[1]))
            for first in range(0, len(group), batch):
                numbers, ids = zip(*group[first : first + batch], strict=True)
                completions = engine.complete(ids, sampling, row_ids=numbers, clean=clean)
                texts |= {n: found.text for n, found in zip(numbers, completions, strict=True)}
                done += len(ids)
                bar.start += engine.stats.compile_s  # says nothing of the time left
                bar(done)
            yield from (texts[number] for number in sorted(texts))


def check_output(args: argparse.Namespace) -> None:
    """Raises before any work if `--predictions` cannot be written."""
    if args.predictions is None:
        return
    path = Path(args.predictions)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"cannot write {path}", "it is a folder, or its folder is not there")
    if args.data is not None and path.exists() and path.resolve() == Path(args.data).resolve():
        raise UsageError(f"--predictions and --data are both {path}", fix="Name another file.")
    if path.exists() and not args.overwrite:
        raise UsageError(
            f"{path} is there already",
            fix="Name another file, or give --overwrite. Without --data it is read and scored.",
        )


class Predictions:
    """Writes JSON lines to `--predictions`, each at once; nothing without one."""

    def __init__(self, args: argparse.Namespace):
        self._path = args.predictions
        self._file: TextIO | None = None

    def __enter__(self) -> Predictions:
        if self._path is not None:
            self._file = open(self._path, "w", encoding="utf-8")
        return self

    def write(self, row: dict[str, Any]) -> None:
        """Writes an object as a line."""
        if self._file is not None:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            note(f"predictions are in {self._path}")
