"""`python -m train.augment`: more wordings of the questions that a model is trained on."""

from collections.abc import Sequence

from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import choose_platform
from glm2_jax.cli.model_choice import add_model_options
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from infer.options import add_adapter_options, add_performance_options
from train.augment.options import (
    AnswerOptions,
    DataOptions,
    MethodOptions,
    OutputOptions,
    Settings,
)

PROG = "python -m train.augment"
DESCRIPTION = """Adds rows with other wordings of the questions to the rows that a model is trained
on. Only the user's side changes: never an answer, a number, a name in quotation marks, code or a
special token.

Each row gets --per-row new ones, by the methods in turn; a method that finds nothing to change
leaves the row to the next. What a model writes is kept only if it has the same numbers, names and
language as the question, is neither too similar nor too different (--similarity), and is no
near-duplicate of another question. The report goes to standard output.

Exit codes: 0 success, 2 usage, 3 bad data, or no new row, 4 model or checkpoint, 5 out of memory or
device, 130 interrupted, 143 terminated (nothing is written)."""
EXAMPLE = f"""{PROG} --data examples/facts.jsonl --methods typo,template --dry-run
  {PROG} --data data.jsonl --methods typo,homophone,template,synonym --per-row 4 --output more.jsonl
  {PROG} --data data.jsonl --methods paraphrase --model chatglm3-6b --output more.jsonl"""


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    add_flags(result, "data", DataOptions)
    add_flags(result, "methods", MethodOptions)
    add_flags(result, "paraphrase and back-translation", AnswerOptions)
    add_model_options(result)
    add_adapter_options(result)
    add_performance_options(result)
    add_flags(result, "output", OutputOptions)
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for an expected error."""
    args = parser().parse_args(argv)
    choose_platform(args.device)
    from train.augment import run

    return run.run(from_flags(Settings, args))


if __name__ == "__main__":
    interrupt.run(main)
