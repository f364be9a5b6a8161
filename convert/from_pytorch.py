"""`python -m convert.from_pytorch SRC DST`: a folder of PyTorch's becomes our own format."""

from convert import options
from glm2_jax.choices import QUANTIZE
from glm2_jax.cli import interrupt
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags


def build_parser() -> Parser:
    """The flags."""
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
        help="write the matrices of the layers as int8 (a scale a row) or int4 (a scale for 128 "
        "columns); none = unpack what is stored quantized (default: as it is stored)",
    )  # fmt: skip
    weights.add_argument(
        "--quantize-embeddings", action="store_true",
        help="with --quantize int8 or int4: write embedding and head in the same way, too",
    )  # fmt: skip
    options.add_shard_size(weights)
    options.add_model_flags(parser)
    writing = parser.add_argument_group("writing")
    options.add_overwrite(writing)
    writing.add_argument(
        "--verify", action="store_true", help="read everything again and compare the checksums"
    )
    options.add_dry_run(writing)
    parser.add_common()
    return parser


def main(argv: list[str]) -> None:
    """Parses and converts."""
    args = build_parser().parse_args(argv)
    choice = from_flags(ModelChoice, args)
    from convert.files.manifest import verify_checkpoint
    from convert.loading.folder import open_folder
    from convert.writing.destination import check_destination
    from convert.writing.own import convert_folder, form_of_conversion, size_of_conversion
    from glm2_jax.schemes import stored_as

    dtype = None if args.dtype == "keep" else args.dtype
    folder = open_folder(options.find_folder(choice, args.source), **choice.form)
    size = size_of_conversion(folder, dtype, args.quantize, args.quantize_embeddings)
    kind, scheme = form_of_conversion(folder, dtype, args.quantize, args.quantize_embeddings)
    stored, written = stored_as(folder.float_dtype, folder.scheme), stored_as(kind.name, scheme)
    options.tell_model(args.source, folder, stored)
    if args.dry_run:
        check_destination(args.destination, args.overwrite, source=folder.path, needed=size)
        note(f"would write {human_size(size)} in {written}")
        options.print_plan(
            args.destination,
            size,
            dtype=kind.name,
            quantization=None if scheme is None else scheme.name,
        )
        return
    with Progress("converting", size, show=human_size) as progress:
        manifest = convert_folder(
            folder,
            args.destination,
            dtype=dtype,
            quantize=args.quantize,
            quantize_embeddings=args.quantize_embeddings,
            overwrite=args.overwrite,
            max_shard_size=args.max_shard_size,
            progress=lambda done, _: progress(done),
        )
    if written != stored:
        note(f"the weights were stored in {stored}; written as {written}")
    if args.verify:
        with Progress("verifying", size, show=human_size) as progress:
            verify_checkpoint(args.destination, lambda done, _: progress(done))
        note(f"verified: {len(manifest.files)} files have the sums of the manifest")
    options.tell_written(human_size(size), args.destination, written)


if __name__ == "__main__":
    interrupt.run(main)
