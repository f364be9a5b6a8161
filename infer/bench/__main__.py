"""`python -m infer.bench`: how fast this device, or a mesh of them, computes a model.

Only the flags are here; what they start is in `infer.bench.run`, which is imported after parsing.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from glm2_jax.choices import DEVICES, DTYPES, LAYER_LAYOUTS, QUANTIZE
from glm2_jax.cli import arguments, flags, interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.parser import Parser
from glm2_jax.processes import join

PROG = "python -m infer.bench"
DESCRIPTION = """Measures reading prompts and answering, per dtype and quantization, and says how
much of the measured memory bandwidth and matrix products that is. Ctrl-C ends it at once and shows
what is measured so far. Exit codes: 0 fine, 2 usage, 3 bad input, 4 model or checkpoint, 5 out of
memory or device, 130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --random chatglm2-6b --quantize none,int8,int4 --batches 1,64
  {PROG} --model chatglm2-6b --dtypes float32,bfloat16 --peer transformers
  {PROG} --random chatglm2-6b --mesh data=2,tensor=4"""


def parser() -> Parser:
    """The flags of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    flags.add_model_options(result)
    add_random_options(result)
    _add_what(result)
    _add_output(result)
    join.refuse_host_options(result, "Speed is measured in one process, on the devices it has.")
    result.add_common()
    return result


def add_random_options(result: Parser) -> None:
    """Random weights instead of a checkpoint."""
    group = result.add_argument_group("random weights")
    group.add_argument(
        "--random",
        type=path_argument,
        metavar="NAME|FILE",
        help="instead of --model: weights made on the device, in the shapes of a published model "
        "such as chatglm2-6b or of a config.json",
    )
    group.add_argument(
        "--layers",
        type=arguments.positive,
        metavar="N",
        help="so many layers instead of the model's own number",
    )


def _add_what(result: Parser) -> None:
    group = result.add_argument_group("what is measured")

    def add(flag: str, **kwargs) -> None:
        group.add_argument(flag, **kwargs)

    add(
        "--preset", choices=("consumer",), metavar="consumer",
        help="a 6B model on a consumer card: published, planned and measured memory and speed; "
        "measured only on a GPU, or where --device cpu asks for it",
    )  # fmt: skip
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    flags.add_mesh_options(group)
    add(
        "--dtypes", type=one_of(DTYPES), default="auto", metavar="A,B",
        help=f"types to compute in, of {', '.join(DTYPES)}",
    )  # fmt: skip
    add(
        "--quantize", type=one_of(QUANTIZE), metavar="A,B",
        help=f"forms of the layers' matrices, of {', '.join(QUANTIZE)} "
        "(default: as stored; random weights: none)",
    )  # fmt: skip
    add(
        "--layout", type=one_of(LAYER_LAYOUTS), metavar="A,B",
        help="how the layers lie in memory, stacked or list (default: by device)",
    )  # fmt: skip
    add(
        "--prompts", type=_numbers, default="128,512", metavar="N,N",
        help="lengths of the prompts to read, one row each; none = no reading",
    )  # fmt: skip
    add(
        "--batches", type=_numbers, default="1,8", metavar="N,N",
        help="rows that are answered together; none = no answering",
    )  # fmt: skip
    add(
        "--contexts", type=_numbers, default="128,512", metavar="N,N",
        help="tokens before the answer, for each of --batches",
    )  # fmt: skip
    add(
        "--steps", type=arguments.positive, default=16, metavar="N", help="tokens of one repetition"
    )
    add("--repeat", type=arguments.positive, default=5, metavar="N", help="repetitions")
    add(
        "--peer", choices=("transformers",), metavar="transformers",
        help="measure the same shapes with its GlmForCausalLM in turns, with random weights: "
        "eager, on a GPU compiled with a static cache, too (not tried on one yet); needs torch "
        "and a checkout",
    )  # fmt: skip


def _add_output(result: Parser) -> None:
    group = result.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    group.add_argument(
        "--markdown", type=path_argument, metavar="F", help="write the tables to a file, too"
    )
    group.add_argument(
        "--plot",
        type=path_argument,
        metavar="F",
        help="draw a roofline picture, .png, .svg or .pdf; needs pip install 'glm2-jax[plot]'",
    )


def one_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: names with commas between them."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in found:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
        return found

    return names


def _numbers(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers of 1 or more with commas between them, or "none"."""
    if text.strip() == "none":
        return ()
    return tuple(sorted({arguments.positive(part) for part in text.split(",")}))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, raises GLMError for what the user can mend."""
    from glm2_jax.errors import UsageError

    arguments.use_utf8()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    named = [
        flag
        for flag, value in (
            ("--model", args.model), ("--random", args.random), ("--preset", args.preset)
        )
        if value is not None
    ]  # fmt: skip
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other.", fix="Leave one out.")
    if args.layers and not args.random:
        raise UsageError("--layers needs --random.", "A checkpoint has the layers that it has.")
    alone = [f"--{name}" for name in ("preset", "peer") if getattr(args, name) is not None]
    if alone and args.mesh is not None:
        raise UsageError(
            f"{' and '.join(alone)}: not on a mesh.",
            "What is compared there computes on one device.",
            "Leave --mesh or --tp out.",
        )
    arguments.choose_platform(args.device)
    if args.peer and "jax" not in sys.modules:  # or nothing is left of a GPU's memory for the peer
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from infer.bench import run

    return run.run(args, argv)


if __name__ == "__main__":
    interrupt.run(main)
