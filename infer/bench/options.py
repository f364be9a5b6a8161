"""The flags that `infer.bench` and `train.bench` share, without jax."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from glm2_jax.choices import DEVICES, DTYPES, LAYER_LAYOUTS, QUANTIZE
from glm2_jax.cli import arguments
from glm2_jax.cli.model_choice import ModelChoice, add_model_options
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of both, and the command line as it was typed."""

    choice: ModelChoice
    random: str | None
    dtypes: tuple[str, ...]
    quantize: tuple[str, ...] | None
    layout: tuple[str, ...] | None
    steps: int
    repeat: int
    peer: str | None
    json: bool
    command: str


def add_model(result: Parser) -> None:
    """Add the flags of the model: a checkpoint, or random weights."""
    add_model_options(result)
    group = result.add_argument_group("random weights")
    group.add_argument(
        "--random", type=arguments.path_argument, metavar="NAME|FILE",
        help="instead of --model: random weights, made on the device, in the shapes of a published "
        "model such as chatglm2-6b or of a config.json",
    )  # fmt: skip


def add_measured(
    result: Parser, *, layout: str | None, steps: int, peer: str, peer_help: str
) -> argparse._ArgumentGroup:
    """Add the flags of what is measured and how often, and return their group."""
    group = result.add_argument_group("what is measured")
    lists: dict[str, Any] = {"metavar": "A,B"}
    count: dict[str, Any] = {"type": arguments.positive, "metavar": "N"}
    add = group.add_argument
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add(
        "--dtypes", type=_one_of(DTYPES), default="auto", **lists,
        help=f"dtypes to compute in, of {', '.join(DTYPES)}",
    )  # fmt: skip
    add(
        "--quantize", type=_one_of(QUANTIZE), **lists,
        help=f"quantizations, of {', '.join(QUANTIZE)} (default: as stored; random weights: none)",
    )  # fmt: skip
    by_device = " (default: by device)" if layout is None else ""
    add(
        "--layout", type=_one_of(LAYER_LAYOUTS), default=layout, **lists,
        help=f"layers stacked or in a list{by_device}",
    )  # fmt: skip
    add("--steps", **count, default=steps, help="steps per repetition")
    add("--repeat", **count, default=5, help="repetitions")
    add("--peer", choices=(peer,), metavar=peer, help=peer_help)
    return group


def _one_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return an argparse type: names with commas between them."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in found:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"expected {', '.join(choices)}, got {name!r}")
        return found

    return names


def parse(
    result: Parser, argv: Sequence[str] | None, *more_models: str
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the flags before jax starts; returns them, and the `Settings` that are no flags.

    Args:
        more_models: flags that name a model, besides --model and --random.

    Raises:
        UsageError: flags contradict each other.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = result.parse_args(argv)
    models = ("model", "random", *more_models)
    named = [f"--{name}" for name in models if vars(args)[name] is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other.", fix="Leave one out.")
    arguments.choose_platform(args.device)
    if args.peer and "jax" not in sys.modules:  # or jax would leave the peer no GPU memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    choice = from_flags(ModelChoice, args, quantize=None)
    return args, {"choice": choice, "command": f"{result.prog} {shlex.join(argv)}".rstrip()}
