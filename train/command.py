"""What the commands `train.lora` and `train.full` share: flags and start. Imports no jax."""

import argparse
import sys
from collections.abc import Callable, Sequence

from glm2_jax.choices import QUANTIZE
from glm2_jax.cli.arguments import choose_platform, path_argument
from glm2_jax.cli.model_choice import (
    EngineOptions,
    ModelChoice,
    add_mesh_options,
    add_model_options,
)
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from glm2_jax.processes import join
from train.data.options import DataOptions
from train.options import (
    RATE,
    AdapterOptions,
    EvaluationOptions,
    OutputOptions,
    TrainingOptions,
)
from train.recipe import Recipe, parse


def make_parser(
    prog: str, description: str, example: str, *, lr: float, output: str, adapter: bool
) -> Parser:
    """Return the parser of a command that trains an adapter, or all parameters."""
    result = Parser(prog=prog, description=description, example=example)
    result.add_argument_group("recipe").add_argument(
        "--config", type=path_argument, metavar="FILE.yml",
        help="read flags from a YAML file, one per line: `lr: 2e-5`; flags of the command line "
        "override it",
    )  # fmt: skip
    add_model_options(result)
    add_flags(result, "data", DataOptions)
    if adapter:
        add_flags(result, "adapter", AdapterOptions).add_argument(
            "--quantize-base", choices=QUANTIZE,
            help="quantize the frozen base to int8 or int4 (QLoRA); none = dequantize a quantized "
            "checkpoint (default: as stored)",
        )  # fmt: skip
    lr_help, default = {"help": RATE.format(lr)}, {"default": adapter}
    add_flags(result, "training", TrainingOptions, lr=lr_help, grad_checkpoint=default)
    group = result.add_argument_group("performance")
    dtype = {
        "help": "compute in this dtype, one of %(choices)s; auto = bfloat16 on TPU and GPUs that "
        "support it, float16 with loss scaling on older GPUs, float32 on CPU where it fits"
    }
    add_flags(group, None, ModelChoice, ("dtype", "device"), dtype=dtype)
    add_mesh_options(group)
    add_flags(group, None, EngineOptions, ("compile_cache",))
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
