"""`python -m infer.generate`: answers one question, or a file of them.

Only the flags are here; what they start is in `infer.generate.run`, which is imported after
parsing.
"""

import argparse
from collections.abc import Sequence

from glm2_jax.cli import arguments, flags, interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.processes import join
from infer import options
from infer.memory.cards import CARDS

PROG = "python -m infer.generate"
DESCRIPTION = """Answers a question with a ChatGLM2, ChatGLM3 or CodeGeeX2 checkpoint.

The answer goes to standard output, all else to standard error. Without a prompt, standard input
is read if it is not a terminal. Exit codes: 0 fine, 1 unexpected, 2 usage, 3 bad input or data,
4 model or checkpoint, 5 out of memory or device, 130 interrupted, 141 output closed, 143
terminated."""
EXAMPLE = f"""{PROG} --prompt 你好 --greedy
  {PROG} --model chatglm2-6b --batch-file in.jsonl --output out.jsonl
  {PROG} --dry-run --config chatglm2-6b --device 3090"""


def parser() -> Parser:
    """The flags of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    flags.add_model_options(result)
    options.add_adapter_options(result)
    _add_prompt_options(result)
    options.add_sampling_options(result)
    performance = options.add_performance_options(result, cards=CARDS)
    flags.add_mesh_options(performance)
    options.add_speculate(performance)
    performance.add_argument(
        "--batch-size",
        type=arguments.positive,
        default=8,
        metavar="N",
        help="lines of a batch file that are answered together",
    )
    join.add_host_options(result)
    _add_output_options(result)
    group = result.add_argument_group("memory plan")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="answer nothing: print how much memory the model takes by weights, context and batch, "
        "what fits the device, and the speed that its memory allows at most (calculated, not "
        "measured); no weights are read. Exit code 5 if nothing fits",
    )
    group.add_argument(
        "--config",
        action=_Once,
        type=path_argument,
        metavar="NAME|FILE",
        help="with --dry-run, in place of --model: a published name or a config.json (default: "
        "chatglm2-6b)",
    )
    result.add_common()
    return result


class _Once(argparse.Action):
    """Stores a value; a second one is an error, since the first would be lost without a word."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice")
        setattr(namespace, self.dest, values)


def _add_prompt_options(result: argparse.ArgumentParser) -> None:
    group = result.add_argument_group("prompt")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        "-p",
        action=_Once,
        metavar="TEXT",
        help="the question; - reads it from standard input",
    )
    source.add_argument(
        "--prompt-file",
        action=_Once,
        type=path_argument,
        metavar="F",
        help="a UTF-8 file that holds the question",
    )
    source.add_argument(
        "--batch-file",
        action=_Once,
        type=path_argument,
        metavar="F",
        help='a line for each question: {"prompt": ...}, with id, history, system if wanted, or '
        '{"messages": [...]} for ChatGLM3; bad lines are reported, the rest is answered',
    )
    group.add_argument(
        "--history",
        action=_Once,
        type=path_argument,
        metavar="F",
        help='JSON file of earlier turns: [["question", "answer"], ...]',
    )
    group.add_argument(
        "--system",
        action=_Once,
        metavar="TEXT",
        help="instructions; ChatGLM2 has no system slot: the text is put before the first "
        "question, with a newline",
    )
    group.add_argument(
        "--clean-text",
        action="store_true",
        help="turn ideographic and no-break spaces of the prompt into plain ones",
    )
    group.add_argument(
        "--truncate-prompt",
        type=arguments.positive,
        metavar="N",
        help="cut a longer prompt to N tokens: the oldest turns first, then the end of the "
        "question; it is always said (default: never cut, a prompt that is too long is an error)",
    )


def _add_output_options(result: argparse.ArgumentParser) -> None:
    group = result.add_argument_group("output")
    group.add_argument(
        "--output",
        "-o",
        action=_Once,
        type=path_argument,
        metavar="F",
        help="where the answers to a batch file go; until all are there, they are kept in "
        "F.partial, and the same command continues after a stop (default: standard output, "
        "each answer as soon as those before it are there; what was stopped starts anew)",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace an --output that is there already"
    )
    group.add_argument(
        "--restart", action="store_true", help="throw away F.partial instead of continuing"
    )
    group.add_argument("--json", action="store_true", help="print a JSON object for each prompt")
    group.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the answer as it comes (default: on a terminal)",
    )
    group.add_argument(
        "--stats", action="store_true", help="times, speed and memory on standard error"
    )


def _refuse_dry_run_flags(config: str | None, device: str) -> None:
    from glm2_jax.errors import UsageError

    if config is not None:
        raise UsageError(
            "--config goes with --dry-run", fix="To answer, name a model: --model DIR."
        )
    if device in CARDS:
        raise UsageError(
            f"--device {device} goes with --dry-run", fix="To compute, use auto, cpu, gpu or tpu."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, raises GLMError for what the user can mend."""
    arguments.use_utf8()
    args = parser().parse_args(argv)
    if args.dry_run:
        from infer.generate import dry_run

        return dry_run.run(from_flags(dry_run.Settings, args))
    _refuse_dry_run_flags(args.config, args.device)
    with join.start(from_flags(join.Hosts, args), vars(args)):
        arguments.choose_platform(args.device)
        from infer.generate import run

        return run.run(from_flags(run.Settings, args))


if __name__ == "__main__":
    interrupt.run(main)
