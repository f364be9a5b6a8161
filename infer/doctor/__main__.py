"""`python -m infer.doctor`: checks this machine and recommends the next command."""

from collections.abc import Sequence

from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, add_flags, from_flags

PROG = "python -m infer.doctor"
DESCRIPTION = """Checks this machine: reports problems, the dtype and quantization of a model
that fits, and the command to run it. Nothing is changed or downloaded.

Exit codes: 0 something can be computed here, 2 usage, 4 the --model folder cannot be opened, 5
jax does not work."""


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=f"{PROG} --model chatglm2-6b")
    group = result.add_argument_group("model")
    group.add_argument(
        "--model", "-m", type=path_argument, metavar="DIR",
        help="a checkpoint folder, to plan with its sizes; its weights are not read "
        "(default: the sizes of a 6B model)",
    )  # fmt: skip
    add_flags(group, None, ModelChoice, ("rope_kind", "family"))
    output = result.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object with the same facts")
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    from infer.doctor import run

    return run.run(from_flags(ModelChoice, args), json=args.json)


if __name__ == "__main__":
    interrupt.run(main)
