"""Answering a batch file: in order, a few lines at a time, each answer written at once."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from convert.cli import EXIT_INPUT, note
from glm2_jax.errors import GLMError, InputError, UsageError
from infer.options import open_engine
from infer.params import SamplingParams
from infer.requests import Request, Turns, read_batch
from infer.respond import add_stats, encode, print_json, print_stats, result, warn_beyond_aligned

if TYPE_CHECKING:
    from infer.engine import Engine


def run_batch(args: argparse.Namespace, sampling: SamplingParams, history: Turns) -> int:
    """Answers the lines of `--batch-file`; returns the exit code.

    A bad line is reported as file:line: reason and left out, which makes the exit code 3.
    """
    check_output(args)
    batch = _Batch(args, sampling)
    requests = list(batch.requests(history))  # before the model is loaded: errors come at once
    if not requests:
        raise InputError(f"{args.batch_file} has no prompt that can be answered")
    engine = open_engine(args)
    total, answered = None, 0
    with open_output(args.output) as file:
        encoded = batch.encoded(engine, requests)
        while chunk := list(islice(encoded, args.batch_size)):
            completions = engine.complete(
                [ids for _, ids in chunk],
                sampling,
                row_ids=range(answered, answered + len(chunk)),
                clean=engine.template != "raw",
            )
            for (request, _), completion in zip(chunk, completions, strict=True):
                print_json(result(engine, request, completion), file)
            answered += len(chunk)
            total = add_stats(total, engine.stats)
    note(f"{answered} answered, {batch.bad} bad lines")
    if args.stats and total is not None:
        print_stats(total)
    return EXIT_INPUT if batch.bad else 0


class _Batch:
    """The lines of a batch file on their way to the engine, and how many were bad."""

    def __init__(self, args: argparse.Namespace, sampling: SamplingParams):
        self.args, self.sampling = args, sampling
        self.bad = 0
        self._warned = False

    def requests(self, history: Turns) -> Iterator[tuple[str, Request]]:
        """The good lines, each with its file:line."""
        path = self.args.batch_file
        name = "standard input" if path == "-" else path
        for number, request in read_batch(path, history=history, system=self.args.system):
            where = f"{name}:{number}"
            if isinstance(request, InputError):
                self._report(where, request)
            else:
                yield where, request.cleaned() if self.args.clean_text else request

    def encoded(
        self, engine: Engine, requests: list[tuple[str, Request]]
    ) -> Iterator[tuple[Request, list[int]]]:
        """The requests that fit, with their ids."""
        for where, request in requests:
            try:
                ids = encode(engine, request, self.sampling, self.args.truncate_prompt, where)
            except (InputError, UsageError) as error:
                self._report(where, error)
                continue
            if not self._warned:
                self._warned = warn_beyond_aligned(engine, len(ids), self.sampling)
            yield request, ids

    def _report(self, where: str, error: GLMError) -> None:
        self.bad += 1
        note(f"{where}: {': '.join(part for part in (error.what, error.why) if part)}")


def check_output(args: argparse.Namespace) -> None:
    """Raises before any work if the answers could not be written, or would replace an input."""
    if args.output in (None, "-"):
        return
    path = Path(args.output)
    for flag, other in (("--batch-file", args.batch_file), ("--history", args.history)):
        if other not in (None, "-") and path.exists() and Path(other).exists():
            if path.samefile(other):
                raise UsageError(f"--output is the same file as {flag}", fix="name another file")
    if path.is_dir():
        raise InputError(f"cannot write {path}", "it is a folder", "name a file")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}", f"there is no folder {path.parent}", "make it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"cannot write {path}", "permission denied")


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
    """Standard output for None and "-", else the file, which is replaced."""
    if path in (None, "-"):
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8") as file:
        yield file
