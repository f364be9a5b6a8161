"""`python -m infer.selftest`: checks that a model computes what it should, and how fast."""

from collections.abc import Sequence

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.model_choice import add_model_options
from glm2_jax.cli.parser import Parser, from_flags
from infer import options

PROG = "python -m infer.selftest"
DESCRIPTION = """Checks a checkpoint (or the bundled demo model): checksums, shapes, finite
values, prompt ids, the greedy answers of published models, and speed.

Exit codes: 0 all passed, 2 usage, 4 a check failed, 5 out of memory or device."""


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=f"{PROG} --model chatglm2-6b")
    add_model_options(result)
    options.add_performance_options(result)
    add = result.add_argument_group("output").add_argument
    add("--json", action="store_true", help="one JSON object instead of a report")
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    arguments.choose_platform(args.device)
    from infer.selftest import run

    return run.run(from_flags(run.Settings, args))


if __name__ == "__main__":
    interrupt.run(main)
