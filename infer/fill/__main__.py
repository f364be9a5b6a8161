"""`python -m infer.fill`: the flags of filling blanks."""

from collections.abc import Sequence

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.model_choice import add_model_options
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from infer import options

PROG = "python -m infer.fill"
DESCRIPTION = """Fills the blanks of a text with a GLM base model (glm-large-chinese,
glm-10b-chinese): [MASK] is words, [sMASK] a sentence, [gMASK] a text of any length at the end.
Several blanks of one kind are filled one after another, and each sees the answers before it.

The complete text goes to standard output, everything else to standard error.

Exit codes: 0 success, 1 unexpected, 2 usage, 3 bad input or data, 4 model or checkpoint, 5 out
of memory or device, 130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --model THUDM/glm-large-chinese --prompt "中国的首都是[MASK]。" """


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE.rstrip())
    add_model_options(result)
    add = result.add_argument_group("text").add_argument
    add("--prompt", "-p", required=True, metavar="TEXT", help="the text with its blanks")
    temperature = {"help": "sampling temperature (default: 0 = greedy)"}
    add_flags(result, "sampling", options.SamplingFlags, temperature=temperature)
    options.add_performance_options(result, mesh=True)
    add = result.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print a JSON object: the text and each answer")
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for an expected error."""
    args = parser().parse_args(argv)
    arguments.choose_platform(args.device)
    sampling = from_flags(options.SamplingFlags, args)
    from infer.fill import run

    return run.run(from_flags(run.Settings, args, sampling=sampling))


if __name__ == "__main__":
    interrupt.run(main)
