"""`python -m infer.evaluate`: measure how good a model is. Only the flags are here."""

import os
import sys
from collections.abc import Sequence

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.arguments import path_argument, positive, whole
from glm2_jax.cli.model_choice import add_model_options
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.processes import join
from infer import options
from infer.datasets import FORMATS
from infer.evaluate.variants import variants

PROG = "python -m infer.evaluate"
DESCRIPTION = """Measures perplexity, the similarity of generated answers to reference answers,
or the accuracy on multiple-choice questions. Results go to standard output, everything else to
standard error.

Exit codes: 0 success, 2 usage, 3 bad input or data, 4 model or checkpoint, 5 out of memory or
device, 130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --compare none,int8,int4
  {PROG} --task generation --data dev.jsonl --predictions answers.jsonl
  {PROG} --task choice --model chatglm2-6b --data ceval/val --two-pass"""


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    _add_input(result)
    add_model_options(result)
    options.add_adapter_options(result)
    _add_tasks(result)
    options.add_performance_options(result, mesh=True)
    join.add_host_options(result)
    add = result.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add(
        "--predictions", type=path_argument, metavar="F",
        help='JSON lines of the answers, for generation {"prompt", "labels", "predict"}; without '
        "--data such a file is read and scored, and no model is needed",
    )  # fmt: skip
    add(
        "--overwrite", action="store_true",
        help="replace an existing --predictions file, also the partial one of an interrupted run",
    )  # fmt: skip
    result.add_common()
    return result


def _add_input(result: Parser) -> None:
    add = result.add_argument_group("what is measured").add_argument
    add(
        "--task", choices=("perplexity", "generation", "choice"), default="perplexity",
        help="perplexity = of texts, or of the answers to questions; generation = BLEU, ROUGE and "
        "METEOR of generated answers; choice = the most likely of A, B, C and D",
    )  # fmt: skip
    add(
        "--data", type=path_argument, metavar="F",
        help='plain text, or rows as train.lora reads them, also {"text"} alone; for choice a csv '
        "file of C-Eval, MMLU or CMMLU, a jsonl file of the official C-Eval script, or a folder of "
        "them (default: 45 bundled questions that are new to the demo model; none for choice)",
    )  # fmt: skip
    add(
        "--format", choices=("auto", *FORMATS), default="auto",
        help="format of --data, as in train.lora; auto = by the keys of each row",
    )  # fmt: skip
    add(
        "--max-bad", type=whole, default=0, metavar="N",
        help="bad rows that may be left out; each is reported as file:line with the reason, more "
        "are an error (exit code 3)",
    )  # fmt: skip
    add("--batch-size", type=positive, default=8, metavar="N", help="rows per batch")


def _add_tasks(result: Parser) -> None:
    add = result.add_argument_group("perplexity").add_argument
    add(
        "--compare", type=variants, metavar="A,B",
        help="compare variants of the model, each a quantization (none, int8, int4), a dtype, or "
        "both (bfloat16:int8): size, perplexity, distance of the logits from the first variant's; "
        "two variants are in memory at once",
    )  # fmt: skip
    add(
        "--window", type=positive, metavar="N",
        help="tokens per window of a text (default: 2048, at most --max-length)",
    )  # fmt: skip
    add(
        "--stride", type=positive, metavar="N",
        help="tokens between the starts of two windows (default: half of --window)",
    )  # fmt: skip
    add = result.add_argument_group("generation, and the first pass of choice").add_argument
    add("--max-new-tokens", type=positive, default=512, metavar="N", help="longest answer")
    add(
        "--max-length", type=positive, metavar="N",
        help="prompt and answer together, in tokens (default: 8192, at most what the model has)",
    )  # fmt: skip
    add(
        "--temperature", type=float, default=0.0, metavar="X",
        help="sampling temperature, 0 = greedy; the official ADGEN script uses 0.95, top-p 0.7",
    )  # fmt: skip
    add("--top-p", type=float, default=1.0, metavar="X", help="as in infer.generate")
    add("--seed", type=int, default=0, metavar="N", help="random seed")
    add = result.add_argument_group("choice").add_argument
    add(
        "--shots", type=whole, default=0, metavar="N",
        help="solved examples before each question, from the folder dev next to the data's folder",
    )  # fmt: skip
    add(
        "--two-pass", action="store_true",
        help="follow the official C-Eval script: the model first answers in words, greedily; then "
        "its words are part of the prompt, and the most likely letter is its answer",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for an expected error."""
    made = parser()
    args = made.parse_args(argv)
    given = {  # flags that differ from their defaults
        action.dest: action.option_strings[0]
        for action in made._actions
        if vars(args).get(action.dest, action.default) != action.default
    }
    with join.start(from_flags(join.Hosts, args), vars(args)):
        arguments.choose_platform(args.device)
        if args.compare and "jax" not in sys.modules:  # leave room on a GPU for a second variant
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from infer.evaluate import run

        return run.run(from_flags(run.Settings, args), given)


if __name__ == "__main__":
    interrupt.run(main)
