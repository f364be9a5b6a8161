"""Answering a batch file: lines of like length together, the answers in the order of the lines.

With an output file the answers are kept in a journal until all are there, so that a run that ends
early is continued. Every line has random numbers of its own, and the lines that are answered
together are the same in every run, so the result does not depend on where one was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TextIO

from glm2_jax.cli.files import real_path
from glm2_jax.cli.main import EXIT_INPUT
from glm2_jax.cli.messages import Progress, note
from glm2_jax.cli.text_input import STDIN, open_input, read_lines
from glm2_jax.errors import GLMError, InputError, UsageError, shown
from glm2_jax.escape import json_line
from glm2_jax.processes import join
from infer.console import print_stats
from infer.engine.params import SamplingParams
from infer.engine.stats import add_stats, together
from infer.generate.journal import SUFFIX, Journal
from infer.requests.exchange import encode, result, warn_beyond_aligned
from infer.requests.request import Request, Turns, parse_batch
from infer.startup import open_engine

if TYPE_CHECKING:
    from infer.engine.engine import Engine
    from infer.engine.stats import Stats
    from infer.generate.run import Settings

_CHUNKS_AHEAD = 16  # sorted together for a stream, where an answer waits for those before it


class Row(NamedTuple):
    """A line that can be answered: its number in the input, from 1, and its prompt's ids."""

    number: int
    request: Request
    ids: list[int]


class Sink(Protocol):
    """Where answers go: a `Journal`, or an `InOrder` stream, or `Elsewhere`."""

    @property
    def done(self) -> Container[int]:
        """Numbers of the lines whose answers are there already."""
        ...

    def append(self, rows: Sequence[tuple[int, str]]) -> None:
        """Takes answers: line number and JSON object."""
        ...


def run_batch(settings: Settings, sampling: SamplingParams, history: Turns) -> int:
    """Answers the lines of `--batch-file`; returns the exit code.

    A bad line is reported as file:line: reason and left out, which makes the exit code 3.
    """
    assert settings.batch_file is not None
    join.compare()
    output = check_output(settings) if join.is_first() else None
    batch = _Batch(settings, sampling, settings.batch_file)
    sha256 = hashlib.sha256()
    with open_input(settings.batch_file) as file:  # before the model is loaded: errors come at once
        requests = batch.requests(read_lines(file, batch.name, sha256.update), history)
    if not requests:
        raise InputError(f"{batch.name} has no prompt that can be answered")
    agreed = {"lines of the batch file": _sum_of(requests)} if join.are_several() else {}
    load = partial(
        open_engine, settings.choice, settings.options, rows=settings.batch_size, contents=agreed
    )
    if not join.of_first(output is not None and not is_stream(output)):
        return batch.to_stream(load(), requests, output)
    if output is None:
        engine = load()
        batch.to_file(engine, requests, Elsewhere(join.of_first(None)))
        return batch.end()
    with Journal(output, restart=settings.restart) as journal:
        run = _run_of(settings, sampling, history, sha256.hexdigest())
        journal.check(run)
        refuse_existing(output, journal, settings.overwrite)
        engine = load()
        journal.begin(run | _model_of(engine))
        join.of_first(list(journal.done))
        batch.to_file(engine, requests, journal)
        journal.finish()
    return batch.end()


def chunks(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Rows to answer together, `size` at most, of like length: less of a chunk is padding.

    Longest first, so that what does not fit into memory shows early.
    """
    ordered = sorted(rows, key=lambda row: (-len(row.ids), row.number))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


class InOrder:
    """Writes answers to a stream as soon as all before them are there.

    Args:
      numbers: the lines that will be answered, rising.
      file: where to.
    """

    done: Container[int] = ()

    def __init__(self, numbers: Sequence[int], file: TextIO):
        self._numbers = iter(numbers)
        self._next = next(self._numbers, None)
        self._waiting: dict[int, str] = {}
        self._file = file

    def append(self, rows: Sequence[tuple[int, str]]) -> None:
        """Takes answers: line number and JSON object."""
        self._waiting.update(rows)
        while self._next in self._waiting:
            self._file.write(self._waiting.pop(self._next) + "\n")  # in one go: no half lines
            self._next = next(self._numbers, None)
        self._file.flush()


class Elsewhere:
    """Stands for the journal in all but the first of several processes: they answer the same lines.

    Args:
      done: numbers of the lines whose answers the first process has already.
    """

    def __init__(self, done: Iterable[int]):
        self.done = set(done)

    def append(self, rows: Sequence[tuple[int, str]]) -> None:
        """Takes answers: line number and JSON object."""
        self.done.update(number for number, _ in rows)


class _Batch:
    """The lines of a batch file on their way to the engine, and what became of them."""

    def __init__(self, settings: Settings, sampling: SamplingParams, path: str):
        self.settings, self.sampling = settings, sampling
        self.name = STDIN if path == "-" else path
        self._answered = self._tokens = self._bad = self._loops = 0
        self._load_s = 0.0
        self._stats: Stats | None = None

    def requests(
        self, lines: Iterable[tuple[int, bytes | InputError]], history: Turns
    ) -> list[tuple[int, Request]]:
        """The good lines, each with its number."""
        good, seen, repeated = [], {}, []
        for number, request in parse_batch(lines, history, self.settings.system):
            if isinstance(request, InputError):
                self._report(number, request)
            else:
                good.append((number, request.cleaned() if self.settings.clean_text else request))
                if request.id is not None and seen.setdefault(request.id, number) != number:
                    repeated.append((number, request.id))
        if repeated:
            number, name = repeated[0]
            note(
                f"warning: {len(repeated)} lines have an id that an earlier one has; the first is "
                f"{self.name}:{number} with {shown(name)} of line {seen[name]}"
            )
        return good

    def to_file(
        self,
        engine: Engine,
        requests: Sequence[tuple[int, Request]],
        journal: Journal | Elsewhere,
    ) -> None:
        """Answers what the journal does not have yet."""
        rows = []
        with Progress("prompts read", len(requests), show=_count) as bar:
            for row in self._encoded(engine, requests):
                rows.append(row)
                bar(len(rows))
        if isinstance(journal, Journal):
            journal.tell(len(rows))
        self._answered = len(journal.done)
        with Progress("rows answered", len(rows), show=_count, done=self._answered) as bar:
            self._answer(engine, rows, journal, bar)

    def to_stream(
        self, engine: Engine, requests: Sequence[tuple[int, Request]], output: Path | None
    ) -> int:
        """Answers everything, a few chunks of lines after the other; returns the exit code."""
        encoded = self._encoded(engine, requests)
        with (
            open_stream(output) as file,
            Progress("rows answered", len(requests), show=_count) as bar,
        ):
            while rows := list(islice(encoded, _CHUNKS_AHEAD * self.settings.batch_size)):
                self._answer(engine, rows, InOrder([row.number for row in rows], file), bar)
        return self.end()

    def _encoded(self, engine: Engine, requests: Sequence[tuple[int, Request]]) -> Iterator[Row]:
        """The requests that fit."""
        warned = False
        for number, request in requests:
            where = f"{self.name}:{number}"
            try:
                ids = encode(engine, request, self.sampling, self.settings.truncate_prompt, where)
            except (InputError, UsageError) as error:
                self._report(number, error)
                continue
            warned = warned or warn_beyond_aligned(engine, len(ids), self.sampling)
            yield Row(number, request, ids)

    def _answer(self, engine: Engine, rows: Sequence[Row], sink: Sink, bar: Progress) -> None:
        """Answers what is not in the sink yet, a chunk at a time.

        A chunk of which a part is there is answered as a whole again: with other rows beside them
        the last digits of log-probabilities may differ.
        """
        for chunk in chunks(rows, self.settings.batch_size):
            new = [row.number not in sink.done for row in chunk]
            if not any(new):
                continue
            completions = engine.complete(
                [row.ids for row in chunk],
                self.sampling,
                row_ids=[row.number - 1 for row in chunk],
                clean=engine.template != "raw",
            )
            answers = []
            for row, completion, wanted in zip(chunk, completions, new, strict=True):
                if wanted:
                    answer = result(engine, row.request, completion)
                    answers.append((row.number, json_line(answer)))
                    self._tokens += len(completion.output_ids)
                    self._loops += completion.finish_reason == "loop"
            sink.append(answers)
            self._answered += len(answers)
            stats = together(completion.stats for completion in completions)
            self._load_s, self._stats = engine.load_s, add_stats(self._stats, stats)
            bar.start += stats.compile_s  # what is over says nothing of the time left
            if isinstance(sink, Journal) or not sys.stdout.isatty():  # there the answers show it
                rate = self._tokens / (time.monotonic() - bar.start)
                bar(self._answered, f"{rate:.0f} tokens/s")

    def end(self) -> int:
        """Says what became of the lines; returns the exit code."""
        loops = f", {self._loops} stopped because they repeated themselves" if self._loops else ""
        note(f"{self._answered} answered, {self._bad} bad lines{loops}")
        if self.settings.stats and self._stats is not None:
            print_stats(self._load_s, self._stats)
        return EXIT_INPUT if self._bad else 0

    def _report(self, number: int, error: GLMError) -> None:
        self._bad += 1
        reason = ": ".join(part for part in (error.what, error.why) if part)
        note(f"{self.name}:{number}: {reason}")


def _sum_of(requests: Sequence[tuple[int, Request]]) -> str:
    """What several processes have to agree on; one at a time, since all may be large."""
    sha256 = hashlib.sha256()
    for number, request in requests:
        sha256.update(json.dumps([number, dataclasses.asdict(request)]).encode())
    return sha256.hexdigest()


def _run_of(
    settings: Settings, sampling: SamplingParams, history: Turns, batch_sha256: str
) -> dict[str, Any]:
    """What the answers depend on, as far as it is known without the model."""
    turns = json.dumps(history).encode()
    return {
        "input": batch_sha256,
        "history": hashlib.sha256(turns).hexdigest() if history else None,
        "system": settings.system,
        "clean_text": settings.clean_text,
        "truncate_prompt": settings.truncate_prompt,
        **dataclasses.asdict(sampling),
    }


def _model_of(engine: Engine) -> dict[str, Any]:
    """What the answers depend on of the model, as it was opened."""
    return {
        "model": engine.checkpoint.fingerprint,
        "template": engine.template,
        "dtype": engine.checkpoint.summary.dtype,
        "quantization": engine.checkpoint.summary.quantization,
        "rope_kind": engine.config.rope_kind,
        "longest": engine.max_length,
    }


def _count(rows: float) -> str:
    return f"{rows:.0f}" if rows >= 10 else f"{rows:.2g}"


@contextlib.contextmanager
def open_stream(path: Path | None) -> Iterator[TextIO]:
    """A pipe or device, or standard output, which stays open."""
    if path is None:
        yield sys.stdout
        return
    try:
        with path.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:  # what a failed write raises has no name
        error.filename = error.filename or str(path)
        raise


def is_stream(path: Path) -> bool:
    """Whether it is a pipe or a device, which takes answers but has no place beside it."""
    return path.exists() and not path.is_file()


def check_output(settings: Settings) -> Path | None:
    """Raises before any work if the answers could not be written, or would replace an input.

    Returns:
      The output file, links followed; a pipe or device as it was named, since the names that
      /dev/stdout leads to need not exist; None for standard output.
    """
    if settings.output in (None, "-"):
        return None
    named, path = Path(settings.output), real_path(settings.output)
    if path.is_dir():
        raise InputError(f"cannot write {path}", "it is a folder", "name a file")
    if is_stream(named):
        return named
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}", f"there is no folder {path.parent}", "make it")
    inputs = {"--batch-file": settings.batch_file, "--history": settings.history}
    for written in (path, path.with_name(path.name + SUFFIX)):
        for flag, other in inputs.items():
            if other not in (None, "-") and written.exists() and Path(other).exists():
                if written.samefile(other):
                    raise _is_input(written, path, flag)
        if written.exists() and _is_standard_input(written):
            raise _is_input(written, path, "standard input")
    if settings.choice.path is not None and path.is_relative_to(
        os.path.realpath(settings.choice.path)
    ):
        raise UsageError(
            f"--output is inside the model's folder {settings.choice.path}",
            fix="name another place",
        )
    for place in (path, path.parent):
        if place.exists() and not os.access(place, os.W_OK):
            raise InputError(f"cannot write {path}", f"permission denied: {place}")
    return path


def _is_input(written: Path, path: Path, flag: str) -> UsageError:
    what = "--output is" if written == path else f"{written.name}, which goes with --output, is"
    return UsageError(f"{what} the same file as {flag}", fix="name another file")


def _is_standard_input(path: Path) -> bool:
    try:
        status = os.fstat(0)
    except OSError:  # closed
        return False
    return stat.S_ISREG(status.st_mode) and os.path.samestat(status, path.stat())


def refuse_existing(output: Path, journal: Journal, overwrite: bool) -> None:
    """Raises UsageError if there are answers that nobody asked to replace."""
    if overwrite or not output.exists() or not output.stat().st_size or journal.is_output(output):
        return
    raise UsageError(
        f"{output} is there already", fix="name another file, or give --overwrite to replace it"
    )
