"""What the commands `train.lora` and `train.full` share: flags and start. Imports no jax."""

import argparse
import sys
from collections.abc import Callable, Sequence

from glm2_jax.cli.arguments import choose_platform, path_argument
from glm2_jax.cli.model_choice import add_model_options
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from glm2_jax.processes import join
from train.data.options import DataOptions
from train.options import (
    RATE,
    EvaluationOptions,
    OutputOptions,
    TrainingOptions,
    add_performance_options,
)
from train.recipe import Recipe, parse


def make_parser(
    prog: str,
    description: str,
    example: str,
    *,
    lr: float,
    remat: bool,
    output: str,
    more: Callable[[Parser], None] = lambda parser: None,
) -> Parser:
    """Return a parser with the flags that both commands have, and those that `more` adds."""
    result = Parser(prog=prog, description=description, example=example)
    result.add_argument_group("recipe").add_argument(
        "--config", type=path_argument, metavar="FILE.yml",
        help="read flags from a YAML file, one per line: `lr: 2e-5`; flags of the command line "
        "override it",
    )  # fmt: skip
    add_model_options(result)
    add_flags(result, "data", DataOptions)
    more(result)
    lr_help, default = {"help": RATE.format(lr)}, {"default": remat}
    add_flags(result, "training", TrainingOptions, lr=lr_help, grad_checkpoint=default)
    add_performance_options(result)
    add_flags(result, "evaluation", EvaluationOptions)
    add_flags(result, "output", OutputOptions, output={"default": output})
    join.add_host_options(result)
    result.add_common()
    return result


def start(
    parser: Parser,
    argv: Sequence[str] | None,
    make_recipe: Callable[[argparse.Namespace], Recipe],
    method: str,
) -> int:
    """Parse the flags, train by a class of `train.methods`, and return the exit code; raises
    GLMError for what the user can fix."""
    args = parse(parser, sys.argv[1:] if argv is None else argv)
    choose_platform(args.device)
    with join.start(from_flags(join.Hosts, args), vars(args)):
        from train import methods
        from train.run import run

        return run(make_recipe(args), getattr(methods, method))
