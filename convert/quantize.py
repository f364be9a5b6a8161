"""`python -m convert.quantize SRC DST`: quantize a model to int4, by the activations of a text."""

import argparse
import contextlib
from functools import partial
from typing import Any

from convert import options
from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.arguments import above_zero, device_argument, path_argument, positive
from glm2_jax.cli.messages import Progress
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.errors import UsageError
from glm2_jax.schemes import GROUPS, grouped_scheme, stored_as


def build_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m convert.quantize",
        description=(
            "Quantizes the matrices of the layers to int4 so that the outputs of the layers change "
            "least on a text, and writes a folder of this project's format. One layer is in memory "
            "at a time, with the activations of the text. A run that was terminated goes on at the "
            "first layer that it had not finished if the same command is given again."
        ),
        example="python -m convert.quantize ./chatglm2-6b ./chatglm2-6b-gptq --method gptq "
        "--calibration text.txt\n"
        "  python -m convert.quantize demo ./demo-gptq --group 64 --samples 48 "
        "--calibration train/demo/pairs.jsonl",
    )
    options.add_places(parser)
    weights = parser.add_argument_group("weights")
    weights.add_argument(
        "--method", choices=("rtn", "awq", "gptq"), default="gptq",
        help="rtn = round to nearest, as --quantize int4 does; awq = scale the input channels "
        "first; gptq = round column by column and correct the columns that follow",
    )  # fmt: skip
    weights.add_argument(
        "--bits", type=int, choices=(4, 3), default=4,
        help="bits of the integers; those of 3 bits are stored in 4, for studies of quality",
    )  # fmt: skip
    weights.add_argument(
        "--group", type=int, choices=GROUPS, default=GROUPS[0], help="columns that share a scale"
    )
    weights.add_argument(
        "--quantize-embeddings", action="store_true",
        help="quantize embedding and head, too, to int8 with a scale per row",
    )  # fmt: skip
    options.add_dtype(weights)
    _add_calibration(parser)
    options.add_last(parser, overwrite=True)
    return parser


def _add_calibration(parser: Parser) -> None:
    """Add the flags of the text, and of what is done with its activations."""
    text = parser.add_argument_group("calibration")
    text.add_argument(
        "--calibration", type=path_argument, metavar="FILE",
        help="plain text, or conversations as training reads them (.jsonl), which the model's "
        "template writes; like what the model will read and write",
    )  # fmt: skip
    text.add_argument(
        "--samples",
        type=positive,
        default=128,
        metavar="N",
        help="pieces of the text that are read",
    )
    text.add_argument("--length", type=positive, default=512, metavar="N", help="tokens of a piece")
    text.add_argument(
        "--no-clip", action="store_true",
        help="awq and gptq: take the scale of the largest value instead of searching the best one",
    )  # fmt: skip
    text.add_argument(
        "--act-order", action="store_true",
        help="gptq: round the columns of the largest activations first",
    )  # fmt: skip
    text.add_argument(
        "--damp", type=above_zero, default=0.01, metavar="X",
        help="gptq: added to the diagonal of the Hessian, as a share of its mean",
    )  # fmt: skip
    text.add_argument(
        "--device", type=device_argument, default="auto", metavar="DEVICE",
        help="where the activations are computed: auto, cpu, gpu, tpu",
    )  # fmt: skip


def check_flags(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that have no effect together, or one that is missing."""
    if args.method != "rtn" and args.calibration is None:
        raise UsageError(
            f"--method {args.method} needs --calibration.",
            "It rounds the weights by the activations of a text.",
            "Name a text file; --method rtn needs none.",
        )
    for flag, given, methods in (
        ("--calibration", args.calibration, ("awq", "gptq")),
        ("--no-clip", args.no_clip, ("awq", "gptq")),
        ("--act-order", args.act_order, ("gptq",)),
    ):
        if given and args.method not in methods:
            raise UsageError(
                f"{flag} has no effect with --method {args.method}.",
                f"It is for {' and '.join(methods)}.",
                "Leave it out, or choose another method.",
            )


def main(argv: list[str]) -> None:
    """Parse the flags and quantize."""
    args = build_parser().parse_args(argv)
    check_flags(args)
    arguments.choose_platform(args.device)
    import jax

    from convert.calibration import run
    from convert.calibration.layer import Form, Method
    from convert.calibration.text import read_samples
    from convert.writing.destination import check_destination
    from convert.writing.own import write_folder
    from glm2_jax.runtime.devices import device_errors, find_device

    folder, _ = options.open_source(from_flags(ModelChoice, args), args.source)
    form = Form(args.group, args.bits)
    method = Method(args.method, form, not args.no_clip, args.act_order, args.damp)
    scheme = grouped_scheme(args.group, args.quantize_embeddings)
    run.check(folder, method, scheme)
    samples = None
    if args.calibration is not None:
        sizes = args.samples, args.length
        samples = read_samples(args.calibration, folder.tokenizer, folder.template, *sizes)
    dtype = None if args.dtype == "keep" else args.dtype
    plan = run.plan_quantization(folder, args.destination, method, scheme, samples, dtype)
    written = stored_as(plan.dtype.name, plan.scheme)
    options.print_model(args.source, folder, None, written, packed=True)

    where: dict[str, Any] = {"overwrite": args.overwrite, "source": folder.path}
    shards = {"max_shard_size": args.max_shard_size, "overwrite": args.overwrite}
    with contextlib.ExitStack() as opened:
        if not args.dry_run:
            check_destination(args.destination, needed=2 * plan.nbytes, **where)
            doing = f"quantizing by {args.samples} samples of {args.length} tokens"
            opened.enter_context(jax.default_device(find_device(args.device)))
            with device_errors(doing), Progress("layers", folder.config.num_layers) as bar:
                layers = run.quantized_layers(folder, args.destination, plan, method, samples, bar)
                opened.enter_context(layers)
        options.write(
            partial(write_folder, args.destination, plan, **shards), args.destination, plan.nbytes,
            written, dry_run=args.dry_run, **where, dtype=plan.dtype.name,
            quantization=scheme.name,
        )  # fmt: skip


if __name__ == "__main__":
    interrupt.run(main)
