"""What `python -m infer.generate` does once its flags are parsed: ask, answer, print."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from convert.cli import human_size, note
from glm2_jax.errors import InputError, UsageError
from glm2_jax.prompt import build_messages, build_prompt, truncate_prompt
from glm2_jax.text import json_line
from infer.opening import open_engine, say_which_model
from infer.options import sampling_params
from infer.params import SamplingParams
from infer.requests import Request, read_history, read_prompt

if TYPE_CHECKING:
    from infer.answer import Completion
    from infer.engine import Engine
    from infer.job import Stats

# All of C0, DEL and C1 but tabs and line ends; a terminal would obey them.
_NO_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\t\n"
}


def run(args: argparse.Namespace) -> int:
    """Answers what the flags ask for; returns the exit code."""
    sampling = sampling_params(args)
    check_flags(args)
    say_which_model(args)
    history = () if args.history is None else read_history(args.history)
    if args.batch_file is not None:
        from infer.batch import run_batch

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


def encode(
    engine: Engine, request: Request, sampling: SamplingParams, truncate: int | None, where: str
) -> list[int]:
    """The ids that a request is asked with, checked to leave room for an answer.

    Args:
      truncate: longest prompt in tokens, where a longer one may be cut; it is said on stderr.
      where: file and line, for what is said; "" for a single prompt.

    Raises:
      InputError: no prompt can be made of it, or it is too long.
    """
    ids = _cut(engine, request, truncate, where) if truncate else _build(engine, request)
    limit = min(engine.max_length, sampling.max_length or engine.max_length)
    if len(ids) >= limit:
        raise InputError(
            f"the prompt is too long: {len(ids)} tokens",
            f"prompt and answer together may have {limit}"
            f" (the model has {engine.config.seq_length})",
            "shorten it, raise --max-length as far as the model goes, or cut it: --truncate-prompt",
        )
    return ids


def _build(engine: Engine, request: Request) -> list[int]:
    if request.messages is None:
        return build_prompt(
            engine.tokenizer, engine.template, request.prompt, request.history, request.system
        )
    if engine.template != "chatglm3":
        raise InputError(
            "messages need the template chatglm3", f"the template here is {engine.template}"
        )
    return build_messages(engine.tokenizer, request.messages)


def _cut(engine: Engine, request: Request, limit: int, where: str) -> list[int]:
    if request.messages is not None:
        ids = _build(engine, request)
        if len(ids) > limit:
            raise InputError(
                f"the messages are too long: {len(ids)} tokens, --truncate-prompt {limit}",
                "messages are never cut",
            )
        return ids
    ids, turns, tokens = truncate_prompt(
        engine.tokenizer, engine.template, request.prompt, request.history, request.system, limit
    )
    if turns or tokens:
        what = [f"the oldest {turns} of {len(request.history)} turns"] if turns else []
        what += [f"the last {tokens} tokens of the question"] if tokens else []
        prefix = f"{where}: " if where else ""
        note(f"{prefix}prompt cut to {len(ids)} tokens: left out {' and '.join(what)}")
    return ids


def warn_beyond_aligned(engine: Engine, longest: int, sampling: SamplingParams) -> bool:
    """Warns if a prompt of `longest` tokens and its answer may pass the aligned length."""
    limit = min(engine.max_length, sampling.max_length or engine.max_length)
    end = min(limit, longest + (sampling.max_new_tokens or limit))
    aligned = engine.config.aligned_length
    if end > aligned:
        note(
            f"warning: prompt and answer may reach {end} tokens; "
            f"beyond {aligned}, the length this model was aligned to, answers get worse"
        )
    return end > aligned


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


def displayed(text: str) -> str:
    """What standard output is given of an answer: a terminal no characters that control it."""
    return text.translate(_NO_CONTROLS) if sys.stdout.isatty() else text


def result(engine: Engine, request: Request, completion: Completion) -> dict[str, Any]:
    """The object that `--json` prints for a prompt."""
    asked = {"prompt": request.prompt}
    if request.messages is not None:
        asked = {"messages": list(request.messages)}
    tokenizer = engine.tokenizer
    special = {token: name for name, token in tokenizer.special.items()}

    def text(token: int) -> str:  # a lone byte has no text, its piece says which one it is
        return tokenizer.token_text(token) or tokenizer.piece(token) or special.get(token, "")

    read, written = len(completion.prompt_ids), len(completion.output_ids)
    answer: dict[str, Any] = {
        **({} if request.id is None else {"id": request.id}),
        **asked,
        "prompt_ids": list(completion.prompt_ids),
        "output_ids": list(completion.output_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        },
    }
    if completion.messages:
        answer["output_messages"] = [message._asdict() for message in completion.messages]
    if isinstance(completion.stop_reason, str):
        answer["stop_reason"] = {"string": completion.stop_reason}
    elif completion.stop_reason is not None:
        token = completion.stop_reason
        answer["stop_reason"] = {"id": token, "token": text(token)}
    if completion.logprobs is not None:
        answer["logprobs"] = [
            {
                "id": entry.token,
                "token": text(entry.token),
                "logprob": entry.logprob,
                "top": [
                    {"id": token, "token": text(token), "logprob": logprob}
                    for token, logprob in entry.top
                ],
            }
            for entry in completion.logprobs
        ]
    return answer


def print_json(value: dict[str, Any], file: Any = None) -> None:
    """Prints one object as one line, at once."""
    file = file or sys.stdout
    file.write(json_line(value) + "\n")  # in one go: no half lines
    file.flush()


def add_stats(total: Stats | None, stats: Stats) -> Stats:
    """The sum over calls: of one engine, so loading and the first token count once."""
    if total is None:
        return dataclasses.replace(stats)
    once = {"load_s", "first_token_s"}
    names = [field.name for field in dataclasses.fields(stats) if field.name not in once]
    sums = {name: getattr(total, name) + getattr(stats, name) for name in names}
    return dataclasses.replace(total, **sums)


def print_stats(stats: Stats) -> None:
    """Times, speed and memory, one per line; compiling is in none of the other times."""
    note(f"load         {stats.load_s:8.2f} s")
    note(f"compile      {stats.compile_s:8.2f} s{_programs(stats)}")
    note(f"first token  {stats.first_token_s:8.3f} s")
    note(f"prefill      {stats.prefill_tokens} tokens, {stats.prefill_rate:.1f} tokens/s")
    note(f"decode       {stats.decode_tokens} tokens, {stats.decode_rate:.1f} tokens/s")
    note_speculation(stats)
    note(f"peak memory  {peak_memory()}")


def note_speculation(stats: Stats) -> None:
    """What came of the drafts, where there were some."""
    if stats.passes:
        accepted, drafted = stats.accepted_tokens, stats.drafted_tokens
        note(
            f"speculation  {accepted} of {drafted} drafted tokens accepted, "
            f"{stats.decode_tokens / stats.passes:.2f} tokens a pass"
        )


def _programs(stats: Stats) -> str:
    if not stats.programs:
        return ""
    kept = f", {stats.programs_kept} of them kept from before" if stats.programs_kept else ""
    return f", {stats.programs} program{'s' if stats.programs > 1 else ''}{kept}"


def peak_memory() -> str:
    """The most memory used so far: by this process, and on the device where it tells."""
    import resource

    import jax

    unit = 1 if sys.platform == "darwin" else 1024
    text = human_size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit) + " (host)"
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return text if device is None else f"{text}, {human_size(device)} (device)"
