"""`python -m infer.generate`: the flags of answering one prompt, or a file of prompts."""

import argparse
from collections.abc import Sequence

from glm2_jax.cli import arguments, flags, interrupt
from glm2_jax.cli.arguments import path_argument, positive
from glm2_jax.cli.messages import note
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.errors import UsageError
from glm2_jax.processes import join
from infer import options
from infer.memory.cards import CARDS

PROG = "python -m infer.generate"
DESCRIPTION = """Answers a prompt with a ChatGLM2, ChatGLM3 or CodeGeeX2 checkpoint.

The answer goes to standard output, everything else to standard error. Without a prompt, standard
input is read if it is not a terminal.

Exit codes: 0 success, 1 unexpected, 2 usage, 3 bad input or data, 4 model or checkpoint, 5 out
of memory or device, 130 interrupted, 141 output closed, 143 terminated."""
EXAMPLE = f"""{PROG} --prompt 你好 --greedy
  {PROG} --model chatglm2-6b --batch-file in.jsonl --output out.jsonl
  {PROG} --dry-run --config chatglm2-6b --device 3090"""
_UNPLANNED = (
    "prompt", "prompt_file", "batch_file", "history", "system", "adapter", "output"
)  # fmt: skip


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    flags.add_model_options(result)
    options.add_adapter_options(result)
    _add_prompt_options(result)
    options.add_sampling_options(result)
    performance = options.add_performance_options(result, cards=CARDS)
    flags.add_mesh_options(performance)
    options.add_speculate(performance)
    performance.add_argument(
        "--batch-size", type=positive, default=8, metavar="N",
        help="lines of a batch file that are answered together",
    )  # fmt: skip
    join.add_host_options(result)
    _add_output_options(result)
    add = result.add_argument_group("memory plan").add_argument
    add(
        "--dry-run", action="store_true",
        help="print the memory for weights, context and batch, what fits the device, and an upper "
        "bound of the speed (calculated, not measured); no weights are read, nothing is answered. "
        "Exit code 5 if nothing fits",
    )  # fmt: skip
    add(
        "--config", type=path_argument, metavar="NAME|FILE",
        help="with --dry-run, instead of --model: a published name or a config.json (default: "
        "chatglm2-6b)",
    )  # fmt: skip
    result.add_common()
    return result


def _add_prompt_options(result: argparse.ArgumentParser) -> None:
    group = result.add_argument_group("prompt")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", "-p", metavar="TEXT",
        help="the prompt; - reads it from standard input",
    )  # fmt: skip
    source.add_argument(
        "--prompt-file", type=path_argument, metavar="F",
        help="a UTF-8 file with the prompt",
    )  # fmt: skip
    source.add_argument(
        "--batch-file", type=path_argument, metavar="F",
        help='JSON lines: {"prompt": ...}, optionally with id, history, system; or {"messages": '
        "[...]} for ChatGLM3; bad lines are reported, the others are answered",
    )  # fmt: skip
    add = group.add_argument
    add(
        "--history", type=path_argument, metavar="F",
        help='JSON file of earlier turns: [["question", "answer"], ...]',
    )  # fmt: skip
    add(
        "--system", metavar="TEXT",
        help="system prompt; ChatGLM2 has no system role: it is put before the first question, "
        "with a newline",
    )  # fmt: skip
    add(
        "--clean-text", action="store_true",
        help="replace ideographic and no-break spaces of the prompt by plain spaces",
    )  # fmt: skip
    add(
        "--truncate-prompt", type=positive, metavar="N",
        help="cut a longer prompt to N tokens: the oldest turns first, then the end of the "
        "question; reported on standard error (default: a prompt that is too long is an error)",
    )  # fmt: skip


def _add_output_options(result: argparse.ArgumentParser) -> None:
    add = result.add_argument_group("output").add_argument
    add(
        "--output", "-o", type=path_argument, metavar="F",
        help="file for the answers to a batch file; until all are there, they are kept in "
        "F.partial, and the same command continues an interrupted run (default: standard output, "
        "each answer as soon as those before it are there; an interrupted run is not continued)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace an existing --output")
    add("--restart", action="store_true", help="discard F.partial instead of continuing it")
    add("--json", action="store_true", help="print a JSON object for each prompt")
    add(
        "--stream", action=argparse.BooleanOptionalAction,
        help="print the answer while it is generated (default: on a terminal)",
    )  # fmt: skip
    add("--stats", action="store_true", help="times, speed and memory on standard error")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for an expected error."""
    args = parser().parse_args(argv)
    sampling = options.sampling_params(vars(args))
    if args.dry_run:
        from infer.generate import dry_run

        if unused := [name for name in _UNPLANNED if vars(args)[name] is not None]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            note(f"--dry-run answers nothing, and the plan is without {flags}")
        return dry_run.run(from_flags(dry_run.Settings, args))
    if args.config is not None:
        raise UsageError("--config needs --dry-run", fix="To answer, name a model: --model DIR.")
    if args.device in CARDS:
        raise UsageError(
            f"--device {args.device} needs --dry-run", fix="To compute, use auto, cpu, gpu or tpu."
        )
    with join.start(from_flags(join.Hosts, args), vars(args)):
        arguments.choose_platform(args.device)
        from infer.generate import run

        return run.run(from_flags(run.Settings, args, sampling=sampling))


if __name__ == "__main__":
    interrupt.run(main)
