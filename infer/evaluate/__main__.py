"""`python -m infer.evaluate`: how good a model is, as figures.

Only the flags are here; what they start is in `infer.evaluate.run`, which is imported after
parsing.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.flags import add_mesh_options, add_model_options
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.processes import join
from infer import options
from infer.datasets import FORMATS
from infer.evaluate.variants import variants

PROG = "python -m infer.evaluate"
TASKS = ("perplexity", "generation", "choice")
DESCRIPTION = """Measures perplexity, the likeness of answers to those that are wanted, or the share
of multiple-choice questions that are answered rightly. Figures go to standard output, all else to
standard error. Exit codes: 0 fine, 2 usage, 3 bad input or data, 4 model or checkpoint, 5 out of
memory or device, 130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --compare none,int8,int4
  {PROG} --task generation --data dev.jsonl --predictions answers.jsonl
  {PROG} --task choice --model chatglm2-6b --data ceval/val --two-pass"""


def parser() -> Parser:
    """The flags of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    group = result.add_argument_group("what is measured")
    group.add_argument(
        "--task",
        choices=TASKS,
        default="perplexity",
        help="perplexity = of texts, or of the answers to questions; generation = BLEU, ROUGE and "
        "METEOR of generated answers; choice = A, B, C or D by likelihood",
    )
    group.add_argument(
        "--data",
        type=path_argument,
        metavar="F",
        help='plain text, or rows as train.lora reads them, also {"text"} alone; of a conversation '
        "every answer counts; for choice a csv file of C-Eval, MMLU or CMMLU, a jsonl file of the "
        "official C-Eval script, or a folder of them (default: 45 bundled questions that the demo "
        "model was not trained on, with answers that it was; none for choice)",
    )
    group.add_argument(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        help="of --data, as in train.lora; auto: by the keys of each row",
    )
    group.add_argument(
        "--max-bad",
        type=_count,
        default=0,
        metavar="N",
        help="rows that cannot be used, and are told as file:line and reason, before it is an "
        "error (exit code 3)",
    )
    group.add_argument(
        "--batch-size",
        type=arguments.positive,
        default=8,
        metavar="N",
        help="rows that are read or answered together",
    )
    add_model_options(result)
    options.add_adapter_options(result)
    _add_perplexity(result)
    _add_generation(result)
    _add_choice(result)
    add_mesh_options(options.add_performance_options(result))
    join.add_host_options(result)
    group = result.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    group.add_argument(
        "--predictions",
        type=path_argument,
        metavar="F",
        help='JSON lines of what the model answered; generation: {"prompt", "labels", "predict"}, '
        "and without --data such a file is read and scored, no model is needed",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a --predictions file that is there, or what a stopped run has left of one",
    )
    result.add_common()
    # `open_engine` asks for both; with the latter it plans memory for --batch-size rows.
    result.set_defaults(stats=False, batch_file="")
    return result


def _add_perplexity(result: Parser) -> None:
    group = result.add_argument_group("perplexity")
    group.add_argument(
        "--compare",
        type=variants,
        metavar="A,B",
        help="forms of the model beside each other: none, int8, int4, a dtype, or both as in "
        "bfloat16:int8; size, perplexity, and how far the logits are from those of the first. Two "
        "forms are in memory at once",
    )
    group.add_argument(
        "--window",
        type=arguments.positive,
        metavar="N",
        help="tokens of a text that are read at once (default: 2048, at most --max-length)",
    )
    group.add_argument(
        "--stride",
        type=arguments.positive,
        metavar="N",
        help="tokens by which windows follow each other: less gives each token more context, and "
        "takes longer (default: half of --window)",
    )


def _add_generation(result: Parser) -> None:
    group = result.add_argument_group("generation, and the first pass of choice")
    group.add_argument(
        "--max-new-tokens",
        type=arguments.positive,
        default=512,
        metavar="N",
        help="longest answer",
    )
    group.add_argument(
        "--max-length",
        type=arguments.positive,
        metavar="N",
        help="prompt and answer together, in tokens (default: 8192, at most what the model has)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 = greedy; the official script of ADGEN draws with 0.95 and top-p 0.7",
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="as in infer.generate")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers")


def _add_choice(result: Parser) -> None:
    group = result.add_argument_group("choice")
    group.add_argument(
        "--shots",
        type=_count,
        default=0,
        metavar="N",
        help="questions with answers before each, from the folder dev beside the data's folder",
    )
    group.add_argument(
        "--two-pass",
        action="store_true",
        help="as the official C-Eval script does: the model writes what it thinks, greedily; then "
        "its text is part of the question, and the likeliest letter is its answer",
    )


def _count(text: str) -> int:
    """An argparse type: a whole number, 0 or more."""
    return 0 if text.strip() == "0" else arguments.positive(text)


def _given(parser: Parser, args: argparse.Namespace) -> dict[str, str]:
    """Name in `args` -> flag, of those that differ from their defaults."""
    return {
        action.dest: action.option_strings[0]
        for action in parser._actions
        if getattr(args, action.dest, action.default) != action.default
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, raises GLMError for what the user can mend."""
    arguments.use_utf8()
    flags = parser()
    args = flags.parse_args(argv)
    with join.start(from_flags(join.Hosts, args), vars(args)):
        arguments.choose_platform(args.device)
        if args.compare and "jax" not in sys.modules:  # or the first form takes a GPU for itself
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from infer.evaluate import run

        return run.run(args, _given(flags, args))


if __name__ == "__main__":
    interrupt.run(main)
