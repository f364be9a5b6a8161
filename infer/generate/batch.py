"""Answer a batch file by continuous batching: a line joins as soon as another one has ended.

Every line has its own random numbers and is computed in shapes that do not depend on the other
lines, so the result does not depend on interruptions.
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from glm2_jax.cli.main import EXIT_INPUT
from glm2_jax.cli.messages import Progress, note
from glm2_jax.cli.text_input import STDIN, open_input, read_lines
from glm2_jax.errors import GLMError, InputError, UsageError
from glm2_jax.escape import json_line
from glm2_jax.processes import join
from glm2_jax.runtime.buckets import bucket
from glm2_jax.text.template import TEMPLATES
from infer.batching.batcher import Batcher
from infer.batching.job import Event, Failure, Job
from infer.batching.options import TOKENS_PER_PREFILL, BatchOptions
from infer.console import print_stats
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.engine.stats import Stats
from infer.generate.options import Settings
from infer.generate.output import (
    Elsewhere,
    InOrder,
    Journal,
    Sink,
    check_output,
    is_stream,
    refuse_existing,
)
from infer.requests.exchange import encode, result, warn_beyond_aligned
from infer.requests.request import Request, Turns, parse_line
from infer.startup import open_engine


class Row(NamedTuple):
    """A line that can be answered: its number in the input, from 1, and its prompt's ids."""

    number: int
    request: Request
    ids: list[int]


def run_batch(settings: Settings, history: Turns) -> int:
    """Answer the lines of `--batch-file`; returns the exit code.

    A bad line is reported as file:line: reason and left out, which makes the exit code 3.
    """
    asked = settings.asked
    assert asked.batch_file is not None
    join.compare()
    inputs = {"--batch-file": asked.batch_file, "--history": asked.history}
    place = settings.out.output if join.is_first() else None
    output = check_output(place, inputs, settings.choice.path)
    batch = _Batch(settings, STDIN if asked.batch_file == "-" else asked.batch_file)
    sha256 = hashlib.sha256()
    with open_input(asked.batch_file) as file:  # before the model is loaded: errors come at once
        requests = batch.read(read_lines(file, batch.name, sha256.update), history)
    if not requests:
        raise InputError(f"{batch.name} has no prompt that can be answered")
    run = _run_facts(settings, history, sha256.hexdigest())
    contents = {"batch file": run["input"], "history": run["history"]}
    rows = settings.batch_size
    load = partial(open_engine, settings.choice, settings.options, rows=rows, contents=contents)
    if not join.of_first(output is not None and not is_stream(output)):
        batch.to_stream(load(), requests, output)
    elif output is None:
        engine = load()
        batch.to_file(engine, requests, Elsewhere(join.of_first(None)))
    else:
        with Journal(output, restart=settings.out.restart) as journal:
            journal.check(run)
            refuse_existing(output, journal, settings.out.overwrite)
            engine = load()
            journal.begin(run | _model_facts(engine, batch.sampling(engine)))
            join.of_first(list(journal.done))
            batch.to_file(engine, requests, journal)
            journal.finish()
    return batch.end()


class _Batch:
    """The lines of a batch file on their way to the engine, and what became of them."""

    def __init__(self, settings: Settings, name: str):
        self.settings, self.name = settings, name
        self._answered = self._tokens = self._bad = self._loops = 0
        self._load_s = 0.0
        self._stats: Stats | None = None

    def read(
        self, lines: Iterable[tuple[int, bytes | InputError]], history: Turns
    ) -> list[tuple[int, Request]]:
        """Return the good lines, each with its number."""
        good, asked = [], self.settings.asked
        for number, line in lines:
            try:
                if isinstance(line, InputError):
                    raise line
                request = parse_line(line, history, asked.system)
                good.append((number, request.cleaned() if asked.clean_text else request))
            except InputError as error:
                self._report(number, error)
        return good

    def to_file(
        self, engine: Engine, requests: Sequence[tuple[int, Request]], sink: Journal | Elsewhere
    ) -> None:
        """Answer what the sink does not have yet."""
        rows = list(self._encoded(engine, requests))
        if isinstance(sink, Journal):
            sink.tell(len(rows))
        self._answer(engine, rows, sink)

    def to_stream(
        self, engine: Engine, requests: Sequence[tuple[int, Request]], output: Path | None
    ) -> None:
        """Answer everything; an answer is written as soon as those before it are there."""
        rows = list(self._encoded(engine, requests))
        stream = nullcontext(sys.stdout) if output is None else output.open("w", encoding="utf-8")
        try:
            with stream as file:
                self._answer(engine, rows, InOrder([row.number for row in rows], file))
        except OSError as error:  # a failed write does not name the file
            error.filename = error.filename or (output and str(output))
            raise

    def _encoded(self, engine: Engine, requests: Sequence[tuple[int, Request]]) -> Iterator[Row]:
        """Yield the requests that fit."""
        warned, sampling = False, self.sampling(engine)
        for number, request in requests:
            where = f"{self.name}:{number}"
            try:
                ids = encode(engine, request, sampling, self.settings.asked.truncate_prompt, where)
            except (InputError, UsageError) as error:
                self._report(number, error)
                continue
            warned = warned or warn_beyond_aligned(engine, len(ids), sampling)
            yield Row(number, request, ids)

    def _answer(self, engine: Engine, rows: Sequence[Row], sink: Sink) -> None:
        """Answer the rows that are not in the sink yet: each joins as soon as a slot is free.

        The shapes follow from all rows, and no row's numbers depend on the others. So an
        interrupted run ends with the same answers.
        """
        self._answered = len(sink.done)
        waiting = (row for row in rows if row.number not in sink.done)
        batcher = Batcher(engine, self._shapes(engine, rows))
        ended: list[tuple[Row, Event]] = []
        with Progress("rows answered", len(rows), show=_count, done=self._answered) as bar:
            while True:
                for row in islice(waiting, 2 * batcher.options.slots - batcher.open):
                    batcher.submit(self._job(engine, row, ended))
                if not batcher.open:
                    break
                batcher.step()
                if ended:
                    sink.append([self._line(engine, *one) for one in ended])
                    self._answered += len(ended)
                    ended.clear()
                    if isinstance(sink, Journal) or not sys.stdout.isatty():  # there they show it
                        seconds = time.monotonic() - bar.start - batcher.stats.compile_s
                        bar(self._answered, f"{self._tokens / seconds:.0f} tokens/s")
        self._load_s, self._stats = engine.load_s, batcher.stats

    def sampling(self, engine: Engine) -> SamplingParams:
        """Return how all lines are answered."""
        return self.settings.sampling.params(engine.written.preset_of)

    def _shapes(self, engine: Engine, rows: Sequence[Row]) -> BatchOptions:
        """Return the shapes for rows, as small as the longest of them allows."""
        sampling, multiple = self.sampling(engine), engine.executor.places.rows
        ceiling = min(sampling.max_length or engine.max_length, engine.max_length)
        longest = max((len(row.ids) for row in rows), default=1)
        wanted = longest + (sampling.max_new_tokens or ceiling)
        slots = min(self.settings.batch_size, max(len(rows), 1))
        return BatchOptions(
            slots=-(-slots // multiple) * multiple,
            size=bucket(min(wanted, ceiling), engine.max_length),
            tokens_per_prefill=min(engine.prefill_chunk, bucket(longest, TOKENS_PER_PREFILL)),
            deterministic=True,
            eager=True,
        )

    def _job(self, engine: Engine, row: Row, ended: list[tuple[Row, Event]]) -> Job:
        def listen(event: Event) -> None:
            if isinstance(event, Failure) or event.completion is not None:
                ended.append((row, event))

        (made,) = engine.rows(
            [row.ids],
            self.sampling(engine),
            row_ids=[row.number - 1],
            clean=engine.written.chat,
        )
        made.index = row.number - 1  # an error names the line
        return Job(made, listen)

    def _line(self, engine: Engine, row: Row, event: Event) -> tuple[int, str]:
        """Return a row's number and its answer as JSON; an answer that failed raises its error."""
        if isinstance(event, Failure):
            raise event.error
        completion = event.completion
        assert completion is not None
        self._tokens += len(completion.output_ids)
        self._loops += completion.finish_reason == "loop"
        return row.number, json_line(result(engine, row.request, completion))

    def end(self) -> int:
        """Report what became of the lines; returns the exit code."""
        loops = f", {self._loops} stopped because they repeated themselves" if self._loops else ""
        note(f"{self._answered} answered, {self._bad} bad lines{loops}")
        if self.settings.out.stats and self._stats is not None:
            print_stats(self._load_s, self._stats)
        return EXIT_INPUT if self._bad else 0

    def _report(self, number: int, error: GLMError) -> None:
        self._bad += 1
        note(f"{self.name}:{number}: {error.cause}")


def _run_facts(settings: Settings, history: Turns, batch_sha256: str) -> dict[str, Any]:
    """Return what the answers depend on, as far as it is known without the model."""
    turns = json.dumps(history).encode()
    one, *others = (
        dataclasses.asdict(settings.sampling.params(template.preset_of))
        for template in TEMPLATES.values()
    )
    return {
        "input": batch_sha256,
        "history": hashlib.sha256(turns).hexdigest() if history else None,
        "system": settings.asked.system,
        "clean_text": settings.asked.clean_text,
        "truncate_prompt": settings.asked.truncate_prompt,
        **{name: x for name, x in one.items() if all(other[name] == x for other in others)},
    }


def _model_facts(engine: Engine, sampling: SamplingParams) -> dict[str, Any]:
    """Return what the answers depend on in the model, and all sampling parameters."""
    return {
        **dataclasses.asdict(sampling),
        "model": engine.checkpoint.fingerprint,
        "template": engine.template,
        "dtype": engine.checkpoint.summary.dtype,
        "quantization": engine.checkpoint.summary.quantization,
        "rope_kind": engine.config.rope_kind,
        "longest": engine.max_length,
    }


def _count(rows: float) -> str:
    return f"{rows:.0f}" if rows >= 10 else f"{rows:.2g}"
