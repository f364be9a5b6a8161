"""What `python -m infer.generate` does once its flags are parsed."""

import dataclasses
import sys

from glm2_jax.cli.messages import note
from glm2_jax.errors import UsageError
from infer.console import displayed, print_json, print_stats
from infer.engine.engine import Engine
from infer.generate.options import Settings
from infer.requests.exchange import encode, result, warn_beyond_aligned
from infer.requests.request import Request, read_history
from infer.startup import note_demo_model, open_engine


def run(settings: Settings) -> int:
    """Answer the prompts that the flags name; returns the exit code."""
    _check_flags(settings)
    note_demo_model(settings.choice)
    history = () if settings.asked.history is None else read_history(settings.asked.history)
    if settings.asked.batch_file is not None:
        from infer.generate.batch import run_batch

        return run_batch(settings, history)
    request = Request(settings.asked.read(), history, settings.asked.system)
    if settings.asked.clean_text:
        request = request.cleaned()
    contents = {"prompt and history": dataclasses.asdict(request)}
    engine = open_engine(settings.choice, settings.options, contents=contents)
    _answer_one(settings, engine, request)
    return 0


def _check_flags(settings: Settings) -> None:
    """Raise UsageError for flags that have no effect together."""
    out, batch = settings.out, settings.asked.batch_file is not None
    as_json = out.json or batch
    if out.output is not None and not batch:
        raise UsageError("--output needs --batch-file.", fix="Use > FILE for a single answer.")
    for flag, given in {"overwrite": out.overwrite, "restart": out.restart}.items():
        if given and out.output is None:
            raise UsageError(f"--{flag} needs --output.")
    if out.stream and as_json:
        raise UsageError(f"--stream excludes {'--batch-file' if batch else '--json'}.")
    if settings.sampling.logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json.")


def _answer_one(settings: Settings, engine: Engine, request: Request) -> None:
    sampling = settings.sampling.params(engine.written.preset_of)
    ids = encode(engine, request, sampling, settings.asked.truncate_prompt, "")
    warn_beyond_aligned(engine, len(ids), sampling)
    stream = settings.out.stream
    if stream is None:
        stream = sys.stdout.isatty() and not settings.out.json
    # Also without streaming: Ctrl-C then ends the loop after the running step.
    completion = None
    try:
        for event in engine.run([ids], sampling, clean=engine.written.chat):
            completion = event.completion
            if stream and event.text:
                print(displayed(event.text), end="", flush=True)
    finally:
        if stream:
            print(flush=True)
    assert completion is not None
    if settings.out.json:
        print_json(result(engine, request, completion))
    elif not stream:
        print(displayed(completion.text), flush=True)
    if completion.finish_reason == "loop":
        note("the answer was stopped because it repeated itself (--loop-stop)")
    if completion.finish_reason == "observation":
        note("the model waits for the result of a tool (<|observation|>)")
    if settings.out.stats:
        print_stats(engine.load_s, completion.stats)
