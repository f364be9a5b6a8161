"""What `python -m infer.generate` does once its flags are parsed: ask, answer, print."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from glm2_jax.cli.messages import note
from glm2_jax.errors import UsageError
from infer.console import displayed, print_json, print_stats
from infer.engine.params import SamplingParams
from infer.options import sampling_params
from infer.requests.exchange import encode, result, warn_beyond_aligned
from infer.requests.request import Request, read_history, read_prompt
from infer.startup import open_engine, say_which_model

if TYPE_CHECKING:
    from infer.engine.engine import Engine


def run(args: argparse.Namespace) -> int:
    """Answers what the flags ask for; returns the exit code."""
    sampling = sampling_params(args)
    check_flags(args)
    say_which_model(args)
    history = () if args.history is None else read_history(args.history)
    if args.batch_file is not None:
        from infer.generate.batch import run_batch

        return run_batch(args, sampling, history)
    request = Request(_prompt_text(args), history, args.system)
    if args.clean_text:
        request = request.cleaned()
    engine = open_engine(args, prompt_and_history=dataclasses.asdict(request))
    _answer_one(args, engine, request, sampling)
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that have no meaning together."""
    batch, as_json = args.batch_file is not None, args.json or args.batch_file is not None
    if args.output is not None and not batch:
        raise UsageError("--output goes with --batch-file", fix="use > FILE for a single answer")
    for flag in ("overwrite", "restart"):
        if getattr(args, flag) and args.output is None:
            raise UsageError(f"--{flag} goes with --output")
    if args.stream and as_json:
        raise UsageError(f"--stream contradicts {'--batch-file' if batch else '--json'}")
    if args.logprobs is not None and not as_json:
        raise UsageError("--logprobs has nowhere to go", fix="add --json")


def _prompt_text(args: argparse.Namespace) -> str:
    if args.prompt_file is not None:
        return read_prompt(args.prompt_file)
    if args.prompt is not None and args.prompt != "-":
        return args.prompt
    if args.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError(
            "no prompt",
            "there is no --prompt, --prompt-file or --batch-file, and nothing on standard input",
            "add --prompt TEXT",
        )
    return read_prompt("-")


def _answer_one(
    args: argparse.Namespace, engine: Engine, request: Request, sampling: SamplingParams
) -> None:
    ids = encode(engine, request, sampling, args.truncate_prompt, "")
    warn_beyond_aligned(engine, len(ids), sampling)
    stream = args.stream
    if stream is None:
        stream = sys.stdout.isatty() and not args.json
    # The streaming loop serves both: Ctrl-C ends it after the step that is running.
    completion = None
    try:
        for event in engine.run([ids], sampling, clean=engine.template != "raw"):
            completion = event.completion
            if stream and event.text:
                sys.stdout.write(displayed(event.text))
                sys.stdout.flush()
    finally:
        if stream:
            print(flush=True)
    assert completion is not None
    if args.json:
        print_json(result(engine, request, completion))
    elif not stream:
        print(displayed(completion.text), flush=True)
    if completion.finish_reason == "loop":
        note("the answer was stopped because it repeated itself (--loop-stop)")
    if completion.finish_reason == "observation":
        note("the model waits for the result of a tool (<|observation|>)")
    if args.stats:
        print_stats(engine.stats)
