"""The flags of `infer.bench` and `train.bench`, without jax."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from glm2_jax.choices import DTYPES, KV, LAYER_LAYOUTS, QUANTIZE
from glm2_jax.cli import arguments
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.model_choice import ModelChoice, add_model_options
from glm2_jax.cli.parser import Parser, add_flags, flag, from_flags
from glm2_jax.errors import UsageError
from glm2_jax.extras import pip_install

count = partial(flag, type=arguments.positive, metavar="N")


def _one_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return an argparse type: names with commas between them."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in found:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"expected {', '.join(choices)}, got {name!r}")
        return found

    return names


def _numbers(text: str) -> tuple[int, ...]:
    """Parse whole numbers of 1 or more, separated by commas, or "none", for argparse."""
    if text.strip() == "none":
        return ()
    return tuple(sorted({arguments.positive(part) for part in text.split(",")}))


_list = partial(flag, metavar="A,B")
lengths = partial(flag, type=_numbers, metavar="N,N")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of both, and the command line as it was typed."""

    choice: ModelChoice
    command: str
    random: str | None = flag(
        "instead of --model: random weights, made on the device, in the shapes of a published "
        "model such as chatglm2-6b or of a config.json",
        type=path_argument, metavar="NAME|FILE",
    )  # fmt: skip
    dtypes: tuple[str, ...] = _list(
        f"dtypes to compute in, of {', '.join(DTYPES)}", type=_one_of(DTYPES), default="auto"
    )
    quantize: tuple[str, ...] | None = _list(
        f"quantizations, of {', '.join(QUANTIZE)} (default: as stored; random weights: none)",
        type=_one_of(QUANTIZE),
    )
    layout: tuple[str, ...] | None = _list(
        "layers stacked or in a list (default: by device)", type=_one_of(LAYER_LAYOUTS)
    )
    steps: int = count("steps per repetition", default=16)
    repeat: int = count("repetitions", default=5)
    peer: str | None = flag(
        "alternate with transformers' GlmForCausalLM in the same shapes, with random weights: "
        "eager, and on a GPU also compiled with a static cache (not tested on a GPU); needs torch "
        "and a source checkout",
        choices=("transformers",), metavar="transformers",
    )  # fmt: skip
    json: bool = flag("one JSON object instead of a table", action="store_true")
    ceilings: bool = flag(
        "measure the limits of the device, and print the shares of them that are reached",
        action=argparse.BooleanOptionalAction, default=True,
    )  # fmt: skip
    tuned: str = "off"  # whether forms of a step are used that were measured; training has others
    kv: str = "auto"  # how caches store keys and values; training has none


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Settings):
    """The flags of `infer.bench`."""

    tuned: str = flag(
        "forms of products and attention: auto = as measured on this device, now if they are not "
        "known yet; off = the usual ones",
        choices=("auto", "off"), default="auto",
    )  # fmt: skip

    kv: str = flag(
        "how caches store keys and values, as in infer.generate", choices=KV, default="auto"
    )
    preset: str | None = flag(
        "a 6B model on a consumer card: planned and measured memory and speed; measured only on a "
        "GPU, or with --device cpu",
        choices=("consumer",), metavar="consumer",
    )  # fmt: skip
    prompts: tuple[int, ...] = lengths(
        "lengths of prompts to prefill, one row each; or none", default="128,512"
    )
    batches: tuple[int, ...] = lengths("batch sizes of decode steps; or none", default="1,8")
    contexts: tuple[int, ...] = lengths(
        "tokens in the cache before decoding, for each batch size", default="128,512"
    )
    plot: str | None = flag(
        "draw a roofline picture, or with --serve throughput and latencies, .png, .svg or .pdf; "
        f"needs {pip_install('plot')}",
        type=path_argument, metavar="F",
    )  # fmt: skip


def add_options(result: Parser, cls: type[Settings], **changes: Any) -> argparse._ActionsContainer:
    """Add the flags of the model and of the settings; returns the group of the settings."""
    add_model_options(result)
    group = add_flags(result, "what is measured", cls, **changes)
    add_flags(group, None, ModelChoice, ("device",))
    return group


def parse(
    result: Parser, argv: Sequence[str] | None, *more_models: str
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the flags before jax starts; returns them, and the `Settings` that are no flags.

    `more_models` are the flags that name a model, besides --model and --random, which exclude each
    other: UsageError.
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
