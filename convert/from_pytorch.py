"""`python -m convert.from_pytorch SRC DST`: convert a PyTorch folder to our own format."""

from collections.abc import Callable

from convert import options
from glm2_jax.choices import QUANTIZE
from glm2_jax.cli import interrupt
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags


def build_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m convert.from_pytorch",
        description=(
            "Converts a published checkpoint folder (.bin, safetensors, int4) or an HF-native one "
            "(GlmForCausalLM of transformers) to this project's format: safetensors with a "
            "manifest of checksums. Neither torch nor code from the folder is run. The new folder "
            "appears complete or not at all."
        ),
        example="python -m convert.from_pytorch ./chatglm2-6b ./chatglm2-6b-jax --dtype bfloat16",
    )
    options.add_places(parser)
    weights = parser.add_argument_group("weights")
    options.add_dtype(weights)
    weights.add_argument(
        "--quantize", choices=QUANTIZE,
        help="write the matrices of the layers as int8 (a scale per row) or int4 (a scale per 128 "
        "columns); none = dequantize (default: as stored)",
    )  # fmt: skip
    weights.add_argument(
        "--quantize-embeddings", action="store_true",
        help="with --quantize int8 or int4: quantize embedding and head, too",
    )  # fmt: skip
    options.add_last(parser, overwrite=True).add_argument(
        "--verify", action="store_true", help="read the new folder and compare its checksums"
    )
    return parser


def main(argv: list[str]) -> None:
    """Parse the flags and convert."""
    args = build_parser().parse_args(argv)
    from convert.writing.own import plan_conversion, write_folder
    from glm2_jax.schemes import stored_as

    folder, _ = options.open_source(from_flags(ModelChoice, args), args.source)
    dtype = None if args.dtype == "keep" else args.dtype
    plan = plan_conversion(folder, dtype, args.quantize, args.quantize_embeddings)
    written = stored_as(plan.dtype.name, plan.scheme)
    options.print_model(args.source, folder, None, written, packed=plan.scheme is not None)
    where = {"overwrite": args.overwrite, "source": folder.path}

    def convert(progress: Callable[[int, int], None]) -> None:
        shards = {"max_shard_size": args.max_shard_size, "progress": progress}
        write_folder(args.destination, plan, overwrite=args.overwrite, **shards)
        if args.verify:
            options.verify(args.destination)

    options.write(
        convert, args.destination, plan.nbytes, written, dry_run=args.dry_run, **where,
        dtype=plan.dtype.name, quantization=plan.scheme and plan.scheme.name,
    )  # fmt: skip


if __name__ == "__main__":
    interrupt.run(main)
