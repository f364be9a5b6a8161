"""What the commands `train.lora` and `train.full` share: flags and start. Imports no jax."""

import argparse
import sys
from collections.abc import Callable, Sequence

from glm2_jax.cli.arguments import choose_platform, path_argument, use_utf8
from glm2_jax.cli.flags import add_model_options
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.processes import join
from train import options, recipe
from train.data.options import add_data_options
from train.recipe import Recipe


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
    add_data_options(result)
    more(result)
    options.add_training_options(result, lr=lr, remat=remat)
    options.add_evaluation_options(result)
    options.add_output_options(result, output)
    join.add_host_options(result)
    result.add_common()
    return result


def start(
    parser: Parser,
    argv: Sequence[str] | None,
    make_recipe: Callable[[argparse.Namespace], Recipe],
    method: str,
) -> int:
    """Parse the flags, train by a class of `train.methods`, and return the exit code.

    Raises:
        GLMError: anything that the user can fix.
    """
    use_utf8()
    args = recipe.parse(parser, sys.argv[1:] if argv is None else argv)
    choose_platform(args.device)
    with join.start(from_flags(join.Hosts, args), vars(args)):
        from train import methods
        from train.run import run

        return run(make_recipe(args), getattr(methods, method))
