"""`python -m infer.evaluate`: measure how good a model is."""

import os
import sys
from collections.abc import Sequence

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.arguments import positive
from glm2_jax.cli.model_choice import add_model_options
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from glm2_jax.processes import join
from infer.evaluate.options import (
    AnswerOptions,
    CasesOptions,
    ChoiceOptions,
    DataOptions,
    OutputOptions,
    PerplexityOptions,
    RateOptions,
    Settings,
)
from infer.options import add_adapter_options, add_performance_options

PROG = "python -m infer.evaluate"
DESCRIPTION = """Measures perplexity, the similarity of generated answers to reference answers,
the accuracy on multiple-choice questions, whether use cases pass their checks, or what people
think of answers. Results go to standard output, everything else to standard error.

Exit codes: 0 success, 2 usage, 3 bad input or data, 4 model or checkpoint, or a case failed, 5 out
of memory or device, 130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --compare none,int8,int4
  {PROG} --task generation --data dev.jsonl --predictions answers.jsonl
  {PROG} --task choice --model chatglm2-6b --data ceval/val --two-pass
  {PROG} --task cases --cases examples/cases/demo.yml --junit cases.xml
  {PROG} --task rate --sheet sheet.html --answers old.jsonl new.jsonl
  {PROG} --task rate --sheet sheet.html --rates ratings-*.json"""


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    add_flags(result, "what is measured", DataOptions)
    add_model_options(result)
    add_adapter_options(result)
    add_flags(result, "perplexity", PerplexityOptions)
    answers = add_flags(result, "generation, cases, and the first pass of choice", AnswerOptions)
    answers.add_argument(
        "--max-length", type=positive, metavar="N",
        help="prompt and answer together, in tokens (default: 8192, at most what the model has)",
    )  # fmt: skip
    add_flags(result, "choice", ChoiceOptions)
    add_flags(result, "cases", CasesOptions)
    add_flags(result, "rate", RateOptions)
    add_performance_options(result, mesh=True)
    join.add_host_options(result)
    add_flags(result, "output", OutputOptions)
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for an expected error."""
    made = parser()
    args = made.parse_args(argv)
    given = made.given(args)
    with join.start(from_flags(join.Hosts, args), vars(args)):
        arguments.choose_platform(args.device)
        if args.compare and "jax" not in sys.modules:  # leave room on a GPU for a second variant
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from infer.evaluate import run

        return run.run(from_flags(Settings, args), given)


if __name__ == "__main__":
    interrupt.run(main)
