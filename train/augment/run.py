"""One run of `python -m train.augment`: rows in, new wordings, rows out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from glm2_jax.cli.files import new_file, real_path, require_file_place
from glm2_jax.cli.messages import Progress, complain, note
from glm2_jax.datasets.rows import read_rows
from glm2_jax.errors import InputError, UsageError
from glm2_jax.escape import json_line
from glm2_jax.extras import pip_install
from infer.evaluate.rows import BadRows
from infer.startup import note_demo_model
from train.augment import noise, options
from train.augment.checker import Checker
from train.augment.options import WITH_MODEL, Settings
from train.augment.report import Counts, examples, report
from train.augment.rows import Row, read_row, with_texts
from train.augment.spans import numbers
from train.augment.templates import TEMPLATES, Templates
from train.augment.words import SYNONYMS, Words, read_synonyms

_SHOWN = 5  # rows of --dry-run
_TRIES = 3  # of a method that makes what is there already
_PACKAGES = {
    options.HOMOPHONE: "pypinyin", options.SCRIPT: "opencc",
    options.SYNONYM: "jieba", options.SWAP: "jieba", options.DELETE: "jieba",
}  # fmt: skip

Change = Callable[[str, Random, float], str]


class New(NamedTuple):
    """A new row: the number of the row it is made of, its method, and its texts by the old ones."""

    row: int
    method: str
    texts: dict[str, str]


def run(settings: Settings) -> int:
    """Augment the rows, write them and print the report; returns the exit code."""
    _check(settings)
    changes = _changes(settings)
    counts = Counts(settings.methods)
    with _output(settings) as file:
        rows = _read(settings)
        if settings.dry_run:
            rows = rows[:_SHOWN]
        new, asked = _by_rule(rows, changes, settings, counts)
        if asked:
            new += _by_model(rows, new, asked, settings, counts)
        new.sort(key=lambda one: one.row)
        if not new:
            raise InputError(
                f"no new row: {counts.rejected} were rejected",
                counts.lines(),
                "Choose other --methods, or wider bounds of --similarity.",
            )
        if settings.dry_run:
            _show(examples(rows, new), aside=settings.json)
        else:
            all_rows = [with_texts(row, {}) for row in rows] + [_fields(rows, x) for x in new]
            _write("".join(f"{json_line(row)}\n" for row in all_rows), file)
    if file is not None:
        note(f"{len(rows) + len(new)} rows are in {settings.output}")
    aside = settings.output == "-" and not settings.dry_run
    _show(report(len(rows), counts, as_json=settings.json), aside=aside)
    return 0


def _show(text: str, *, aside: bool) -> None:
    """Print lines on standard output, or where a program reads that, on standard error."""
    if aside:
        complain(*text.splitlines())
    else:
        print(text, flush=True)


def _fields(rows: Sequence[Row], one: New) -> dict[str, Any]:
    return with_texts(rows[one.row], one.texts, one.method)


def _check(settings: Settings) -> None:
    """Refuse at once what would fail at the end."""
    low, high = settings.similarity or (options.LOW, options.HIGH)
    if low > high:
        raise UsageError(
            f"--similarity must be LOW HIGH, got {low:g} {high:g}.", fix="Swap the two numbers."
        )
    for method in settings.methods:
        if (name := _PACKAGES.get(method)) is not None and importlib.util.find_spec(name) is None:
            raise UsageError(
                f"{name} is not installed, and the method {method} needs it",
                fix=pip_install("augment"),
            )


def _output(settings: Settings) -> AbstractContextManager[Path | None]:
    """Return a context that gives the file to write, which no other run can write meanwhile; None
    for standard output, and where nothing is written."""
    if settings.dry_run or settings.output == "-":
        return nullcontext()
    if settings.output is None:
        raise UsageError(
            "No --output was given.", fix="Name a file, or look at examples first: --dry-run."
        )
    place = require_file_place(settings.output)
    if place in [real_path(path) for path in settings.data]:
        raise UsageError(
            f"--output and --data are both {settings.output}", fix="Name another file."
        )

    def check() -> None:
        if not settings.overwrite:
            raise UsageError(
                f"{settings.output} exists already", fix="Name another file, or add --overwrite."
            )

    return new_file(place, check)


def _changes(settings: Settings) -> dict[str, Change]:
    """Return the functions of the methods that need no model."""
    templates = Templates(settings.templates or TEMPLATES)
    words = Words(read_synonyms(settings.synonyms or SYNONYMS))
    found = {
        options.TYPO: noise.typo, options.HOMOPHONE: noise.homophone,
        options.WIDTH: noise.width, options.SCRIPT: noise.script, options.SYNONYM: words.synonym,
        options.SWAP: words.swap, options.DELETE: words.delete,
    }  # fmt: skip
    found = {name: partial(_with_its_numbers, change) for name, change in found.items()}
    return found | {options.TEMPLATE: templates.wrap}


def _with_its_numbers(change: Change, text: str, rng: Random, rate: float) -> str:
    """Return a changed text, or the text where its numbers would be others: 3 and 5 for two things
    become 35 without the word between them."""
    new = change(text, rng, rate)
    return new if numbers(new) == numbers(text) else text


def _read(settings: Settings) -> list[Row]:
    """Return the rows of all files; InputError where too many are bad, or formats differ."""
    bad = BadRows(settings.max_bad)
    found = chain.from_iterable(map(read_rows, settings.data))
    placed = ((where, x if isinstance(x, InputError) else (where, x)) for where, x in found)

    def parse(one: tuple[str, Any]) -> Row:
        return read_row(*one, settings.format)

    rows = [row for _, row in bad.keep(placed, parse)]
    bad.check(len(rows))
    other = next((row for row in rows if row.format != rows[0].format), None)
    if other is not None:
        raise InputError(
            "the rows have several formats",
            f"{rows[0].where} is {rows[0].format}, {other.where} is {other.format}",
            "Augment the files of each format on their own.",
        )
    return rows


def _by_rule(
    rows: Sequence[Row], changes: dict[str, Change], settings: Settings, counts: Counts
) -> tuple[list[New], list[tuple[int, str]]]:
    """Return the new rows of the methods that need no model, and which rows a model gets, with its
    methods."""
    seen = {tuple(row.texts) for row in rows}
    new: list[New] = []
    asked: list[tuple[int, str]] = []
    methods = list(settings.methods)
    with Progress("rows", len(rows)) as bar:
        for number, row in enumerate(rows):
            for copy in range(settings.per_row):
                rng = Random(f"{settings.seed} {number} {copy}")
                first = (number + copy) % len(methods)
                for method in methods[first:] + methods[:first]:
                    if method in WITH_MODEL:
                        asked.append((number, method))
                        break
                    texts = _changed(row, method, changes[method], rng, settings.rate, seen)
                    if texts:
                        seen.add(tuple(texts[text] for text in row.texts))
                        new.append(New(number, method, texts))
                        counts.keep(method)
                        break
                    counts.reject(method, "nothing new")
            bar(number + 1)
    return new, asked


def _changed(
    row: Row, method: str, change: Change, rng: Random, rate: float, seen: set[tuple[str, ...]]
) -> dict[str, str]:
    """Return the new texts of a row by the old ones; none where all that was tried is in `seen`."""
    for _ in range(_TRIES):
        changed = [row.texts[-1]] if method == options.TEMPLATE else row.texts
        texts = {text: text for text in row.texts}
        texts |= {text: change(text, rng, rate) for text in changed}
        if tuple(texts[text] for text in row.texts) not in seen:
            return texts
    return {}


def _by_model(
    rows: Sequence[Row], new: Sequence[New], asked: Sequence[tuple[int, str]],
    settings: Settings, counts: Counts,
) -> list[New]:  # fmt: skip
    """Return the new rows that a model writes and the checker keeps."""
    note_demo_model(settings.choice)
    from infer.engine.params import SamplingParams
    from infer.startup import open_engine
    from train.augment.model import write

    batch = settings.batch_size
    sampling = SamplingParams(
        temperature=settings.temperature, top_p=settings.top_p, top_k=0, seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
    )  # fmt: skip
    engine = open_engine(settings.choice, settings.options, rows=batch)
    known = chain.from_iterable(one.texts.values() for one in new)
    low, high = settings.similarity or (options.LOW, options.HIGH)
    checker = Checker(low, high, chain((row.texts[-1] for row in rows), known))
    found: list[New] = []
    for method in dict.fromkeys(method for _, method in asked):
        numbers = [number for number, name in asked if name == method]
        questions = [rows[number].texts[-1] for number in numbers]
        written = write(engine, method, questions, sampling, batch)
        for number, old, one in zip(numbers, questions, written, strict=True):
            if reason := one.reason or checker.reason(old, one.text):
                counts.reject(method, reason)
            else:
                counts.keep(method)
                found.append(New(number, method, {old: one.text}))
    return found


def _write(lines: str, file: Path | None) -> None:
    if file is None:
        print(lines, end="", flush=True)
    else:
        file.write_bytes(lines.encode())
