"""What `python -m infer.generate` does once its flags are parsed."""

import dataclasses
import sys
from dataclasses import dataclass

from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.errors import UsageError
from infer.console import displayed, print_json, print_stats
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.requests.exchange import encode, result, warn_beyond_aligned
from infer.requests.request import Request, read_history, read_prompt
from infer.startup import note_demo_model, open_engine


@dataclass(frozen=True)
class Settings:
    """The flags of the command, but those of a dry run and of several processes."""

    choice: ModelChoice
    options: EngineOptions
    sampling: SamplingParams
    prompt: str | None
    prompt_file: str | None
    batch_file: str | None
    history: str | None
    system: str | None
    clean_text: bool
    truncate_prompt: int | None
    batch_size: int
    output: str | None
    overwrite: bool
    restart: bool
    json: bool
    stream: bool | None
    stats: bool


def run(settings: Settings) -> int:
    """Answer the prompts that the flags name; returns the exit code."""
    check_flags(settings)
    note_demo_model(settings.choice)
    history = () if settings.history is None else read_history(settings.history)
    if settings.batch_file is not None:
        from infer.generate.batch import run_batch

        return run_batch(settings, history)
    request = Request(_prompt_text(settings), history, settings.system)
    if settings.clean_text:
        request = request.cleaned()
    contents = {"prompt and history": dataclasses.asdict(request)}
    engine = open_engine(settings.choice, settings.options, contents=contents)
    _answer_one(settings, engine, request)
    return 0


def check_flags(settings: Settings) -> None:
    """Raise UsageError for flags that have no effect together."""
    batch = settings.batch_file is not None
    as_json = settings.json or batch
    if settings.output is not None and not batch:
        raise UsageError("--output needs --batch-file", fix="use > FILE for a single answer")
    for flag, given in {"overwrite": settings.overwrite, "restart": settings.restart}.items():
        if given and settings.output is None:
            raise UsageError(f"--{flag} needs --output")
    if settings.stream and as_json:
        raise UsageError(f"--stream excludes {'--batch-file' if batch else '--json'}")
    if settings.sampling.logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json")


def _prompt_text(settings: Settings) -> str:
    if settings.prompt_file is not None:
        return read_prompt(settings.prompt_file)
    if settings.prompt not in (None, "-"):
        return settings.prompt
    if settings.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError(
            "no prompt",
            "--prompt, --prompt-file and --batch-file are missing, and standard input is a "
            "terminal or closed",
            "add --prompt TEXT",
        )
    return read_prompt("-")


def _answer_one(settings: Settings, engine: Engine, request: Request) -> None:
    ids = encode(engine, request, settings.sampling, settings.truncate_prompt, "")
    warn_beyond_aligned(engine, len(ids), settings.sampling)
    stream = settings.stream
    if stream is None:
        stream = sys.stdout.isatty() and not settings.json
    # Also without streaming: Ctrl-C then ends the loop after the running step.
    completion = None
    try:
        for event in engine.run([ids], settings.sampling, clean=engine.template != "raw"):
            completion = event.completion
            if stream and event.text:
                print(displayed(event.text), end="", flush=True)
    finally:
        if stream:
            print(flush=True)
    assert completion is not None
    if settings.json:
        print_json(result(engine, request, completion))
    elif not stream:
        print(displayed(completion.text), flush=True)
    if completion.finish_reason == "loop":
        note("the answer was stopped because it repeated itself (--loop-stop)")
    if completion.finish_reason == "observation":
        note("the model waits for the result of a tool (<|observation|>)")
    if settings.stats:
        print_stats(engine.load_s, completion.stats)
