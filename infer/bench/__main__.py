"""`python -m infer.bench`: how fast this device, or a mesh of them, computes a model.

Only the flags are here; what they start is in `infer.bench.run`, which is imported after parsing.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence

from glm2_jax.choices import DEVICES, DTYPES, LAYER_LAYOUTS, QUANTIZE
from glm2_jax.cli import arguments, flags, interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.commands import as_typed
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.processes import join

PROG = "python -m infer.bench"
DESCRIPTION = """Measures prefill and decode speed by dtype and quantization, as percentages of
the measured memory bandwidth and matrix product rate. Ctrl-C stops and shows what was measured
so far.

Exit codes: 0 success, 2 usage, 3 bad input, 4 model or checkpoint, 5 out of memory or device,
130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --random chatglm2-6b --quantize none,int8,int4 --batches 1,64
  {PROG} --model chatglm2-6b --dtypes float32,bfloat16 --peer transformers
  {PROG} --random chatglm2-6b --mesh data=2,tensor=4"""


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    flags.add_model_options(result)
    add_random_options(result)
    _add_measured(result)
    _add_output(result)
    join.refuse_host_options(result, "Speed is measured in one process, on the devices it has.")
    result.add_common()
    return result


def add_random_options(result: Parser) -> None:
    """Add the flags for random weights instead of a checkpoint."""
    group = result.add_argument_group("random weights")
    group.add_argument(
        "--random",
        type=path_argument,
        metavar="NAME|FILE",
        help="instead of --model: random weights, made on the device, in the shapes of a published "
        "model such as chatglm2-6b or of a config.json",
    )
    group.add_argument(
        "--layers",
        type=arguments.positive,
        metavar="N",
        help="number of layers (default: the model's)",
    )


def _add_measured(result: Parser) -> None:
    group = result.add_argument_group("what is measured")

    def add(flag: str, **kwargs) -> None:
        group.add_argument(flag, **kwargs)

    def add_list(flag: str, choices: Sequence[str], what: str, **kwargs) -> None:
        add(flag, type=one_of(choices), metavar="A,B", help=what, **kwargs)

    def add_numbers(flag: str, default: str, what: str) -> None:
        add(flag, type=_numbers, default=default, metavar="N,N", help=what)

    add(
        "--preset", choices=("consumer",), metavar="consumer",
        help="a 6B model on a consumer card: planned and measured memory and speed; "
        "measured only on a GPU, or with --device cpu",
    )  # fmt: skip
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    flags.add_mesh_options(group)
    add_list("--dtypes", DTYPES, f"dtypes to compute in, of {', '.join(DTYPES)}", default="auto")
    add_list(
        "--quantize",
        QUANTIZE,
        f"quantizations, of {', '.join(QUANTIZE)} (default: as stored; random weights: none)",
    )
    add_list("--layout", LAYER_LAYOUTS, "layers stacked or in a list (default: by device)")
    add_numbers("--prompts", "128,512", "lengths of prompts to prefill, one row each; or none")
    add_numbers("--batches", "1,8", "batch sizes of decode steps; or none")
    add_numbers("--contexts", "128,512", "tokens in the cache before decoding, for each batch size")
    add("--steps", type=arguments.positive, default=16, metavar="N", help="steps per repetition")
    add("--repeat", type=arguments.positive, default=5, metavar="N", help="repetitions")
    add(
        "--peer", choices=("transformers",), metavar="transformers",
        help="alternate with transformers' GlmForCausalLM in the same shapes, with random "
        "weights: eager, and on a GPU also compiled with a static cache (not tested on a GPU); "
        "needs torch and a source checkout",
    )  # fmt: skip


def _add_output(result: Parser) -> None:
    group = result.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    group.add_argument(
        "--plot",
        type=path_argument,
        metavar="F",
        help="draw a roofline picture, .png, .svg or .pdf; needs pip install 'glm2-jax[plot]'",
    )


def one_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for what the user can fix."""
    from glm2_jax.errors import UsageError

    arguments.use_utf8()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    models = {"--model": args.model, "--random": args.random, "--preset": args.preset}
    named = [flag for flag, value in models.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other.", fix="Leave one out.")
    if args.layers and not args.random:
        raise UsageError("--layers needs --random.", "The layers of a checkpoint are fixed.")
    alone = {"--preset": args.preset, "--peer": args.peer}
    refused = [flag for flag, value in alone.items() if value is not None]
    if refused and args.mesh is not None:
        raise UsageError(
            f"{' and '.join(refused)}: not supported on a mesh.",
            "They measure one device.",
            "Leave --mesh or --tp out.",
        )
    arguments.choose_platform(args.device)
    if args.peer and "jax" not in sys.modules:  # or jax would leave the peer no GPU memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from infer.bench import run

    choice = from_flags(ModelChoice, args, layers=None, quantize=None)
    command = as_typed(f"{PROG} {shlex.join(argv)}".rstrip())
    return run.run(from_flags(run.Settings, args, choice=choice, command=command))


if __name__ == "__main__":
    interrupt.run(main)
