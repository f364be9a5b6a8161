"""What the commands that train share: flags and start. Imports no jax."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from glm2_jax.choices import DEVICES, QUANTIZE
from glm2_jax.cli.arguments import choose_platform, device_argument, path_argument
from glm2_jax.cli.bundled import RECIPES
from glm2_jax.cli.model_choice import (
    EngineOptions,
    ModelChoice,
    add_mesh_options,
    add_model_options,
)
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from glm2_jax.errors import UsageError
from glm2_jax.processes import join
from infer.memory.budget import find_budget, take_gpu_share
from infer.memory.cards import CARDS, MESHES
from train.data.options import DataOptions
from train.options import (
    RATE,
    TUNED,
    EvaluationOptions,
    OutputOptions,
    TrainingOptions,
)
from train.recipe import Recipe, parse


def make_parser(
    prog: str,
    description: str,
    example: str,
    *,
    output: str,
    lr: float = 0.0,
    adapter: tuple[str, type] | None = None,
    preference: type | None = None,
    changes: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> Parser:
    """Return the parser of a command that trains.

    `adapter` is what it trains on a frozen base, a title and the class of its flags; None = all
    parameters. `preference` is the class of the flags of a loss of pairs. `changes` are other
    arguments of the flags of data, adapter, training and evaluation, see `add_flags`; without one
    for it, `lr` is the default learning rate of a wide model.
    """
    others: Any = {"lr": {"help": RATE.format(lr)}, **changes}
    result = Parser(prog=prog, description=description, example=example)
    result.add_argument_group("recipe").add_argument(
        "--config", type=path_argument, metavar="NAME|FILE.yml",
        help="read flags from a YAML file, one per line: `lr: 2e-5`, or from a bundled recipe, one "
        f"of {', '.join(RECIPES)}; flags of the command line override it",
    )  # fmt: skip
    add_model_options(result)
    add_flags(result, "data", DataOptions, **others)
    if adapter is not None:
        add_flags(result, adapter[0], adapter[1], **others).add_argument(
            "--quantize-base", choices=QUANTIZE,
            help="quantize the frozen base to int8 or int4 (QLoRA); none = dequantize a quantized "
            "checkpoint (default: as stored)",
        )  # fmt: skip
    if preference is not None:
        add_flags(result, "preference", preference)
    add_flags(result, "training", TrainingOptions, **others)
    _add_performance_options(result)
    add_flags(result, "evaluation", EvaluationOptions, **others)
    add_flags(result, "output", OutputOptions, output={"default": output})
    join.add_host_options(result)
    result.add_argument_group("memory plan").add_argument(
        "--dry-run", action=_DryRun, nargs=0, default=False,
        help="print the memory that the run would take on --device, which need not be here, and "
        "what fits; --model may also be a published name or a config.json. No weights and no data "
        "are read. Exit code 5 if nothing fits",
    )  # fmt: skip
    result.add_common()
    return result


def _add_performance_options(parser: Parser) -> None:
    """Add the flags that say where and in which dtype the model is computed."""
    group = parser.add_argument_group("performance")
    dtype = {
        "help": "compute in this dtype, one of %(choices)s; auto = bfloat16 on TPU and GPUs that "
        "support it, float16 with loss scaling on older GPUs, float32 on CPU where it fits"
    }
    device = {
        "help": f"device: {', '.join(DEVICES)}; with --dry-run also one of {', '.join(CARDS)}, or "
        "several, such as v5e-8 or 8xh200",
        "type": partial(device_argument, more=CARDS, pattern=MESHES),
    }  # fmt: skip
    add_flags(group, None, ModelChoice, ("dtype", "device"), dtype=dtype, device=device)
    add_mesh_options(group)
    add_flags(group, None, EngineOptions, ("tuned", "compile_cache"), tuned={"help": TUNED})


class _DryRun(argparse.Action):
    """Stores that nothing is trained, for which no data is needed."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, True)
        for action in parser._actions:
            action.required = False


def start(
    parser: Parser,
    argv: Sequence[str] | None,
    make_recipe: Callable[[argparse.Namespace], Recipe],
    method: str,
) -> int:
    """Parse the flags, train by a class of `train.methods`, and return the exit code; raises
    GLMError for what the user can fix."""
    args = parse(parser, sys.argv[1:] if argv is None else argv)
    if args.dry_run:
        choose_platform("cpu")
        from train import dry_run

        return dry_run.run(make_recipe(args))
    if args.device not in DEVICES:
        raise UsageError(
            f"--device {args.device} needs --dry-run", fix="To compute, use auto, cpu, gpu or tpu."
        )
    choose_platform(args.device)
    take_gpu_share(find_budget(args.device), math.inf)
    with join.start(from_flags(join.Hosts, args), vars(args)):
        from train import methods
        from train.run import run

        return run(make_recipe(args), getattr(methods, method))
