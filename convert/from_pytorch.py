"""`python -m convert.from_pytorch SRC DST`: a folder of PyTorch's becomes our own format."""

import argparse
import json

from convert import interrupt
from convert.cli import Parser, Progress, human_size, note, path_argument, size_argument
from convert.hub import add_hub_flags, find_model

# Spelt out here, and compared with the library's lists in a test, so that --help needs no jax.
DTYPES = ("keep", "float32", "fp32", "bfloat16", "bf16", "float16", "fp16", "half")
QUANTIZE = ("int8", "int4", "none")
ROPE_KINDS = ("linear", "base")
TEMPLATES = ("chatglm2", "chatglm3", "raw")


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
    parser.add_argument(
        "source", metavar="SRC", type=path_argument, help="the folder to read, or OWNER/NAME"
    )
    parser.add_argument("destination", metavar="DST", type=path_argument, help="the one to write")
    weights = parser.add_argument_group("weights")
    weights.add_argument(
        "--dtype", choices=DTYPES, default="keep", metavar="TYPE",
        help="type to store: keep, float32, bfloat16 or float16",
    )  # fmt: skip
    weights.add_argument(
        "--quantize", choices=QUANTIZE,
        help="write the matrices of the layers as int8 (a scale a row) or int4 (a scale for 128 "
        "columns); none = unpack what is stored quantised (default: as it is stored)",
    )  # fmt: skip
    weights.add_argument(
        "--quantize-embeddings", action="store_true",
        help="with --quantize int8 or int4: write embedding and head in the same way, too",
    )  # fmt: skip
    weights.add_argument(
        "--max-shard-size", type=size_argument, default="4GB", metavar="SIZE",
        help="largest size of one weight file",
    )  # fmt: skip
    add_model_flags(parser)
    writing = parser.add_argument_group("writing")
    writing.add_argument(
        "--overwrite", action="store_true",
        help="replace DST if it is a folder of this format; the old one goes at the very end",
    )  # fmt: skip
    writing.add_argument(
        "--verify", action="store_true", help="read everything again and compare the checksums"
    )
    writing.add_argument(
        "--dry-run", action="store_true", help="check the source and say what would be written"
    )
    parser.add_common()
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags for what a folder does not tell about itself."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--rope-scaling", choices=ROPE_KINDS,
        help="meaning of rope_ratio where the folder does not tell it: linear divides positions "
        "(chatglm2-6b-32k), base multiplies the rotary base (chatglm3-6b-32k, -128k)",
    )  # fmt: skip
    model.add_argument(
        "--template", choices=TEMPLATES, help="prompt template instead of the family's own"
    )
    add_hub_flags(parser.add_argument_group("hub"))


def main(argv: list[str]) -> None:
    """Parses and converts."""
    args = build_parser().parse_args(argv)
    from convert.destination import check_destination
    from convert.folder import open_folder
    from convert.manifest import verify_checkpoint
    from convert.own_format import convert_folder, form_of_conversion, size_of_conversion
    from glm2_jax.schemes import stored_as

    dtype = None if args.dtype == "keep" else args.dtype
    path = find_model(args.source, source=args.hub_source, revision=args.revision)
    folder = open_folder(path, rope_kind=args.rope_scaling, template=args.template)
    size = size_of_conversion(folder, dtype, args.quantize, args.quantize_embeddings)
    kind, scheme = form_of_conversion(folder, dtype, args.quantize, args.quantize_embeddings)
    stored, written = stored_as(folder.float_dtype, folder.scheme), stored_as(kind.name, scheme)
    note(
        f"{args.source}: {folder.layout}, {folder.config.family}, "
        f"{folder.config.num_params:,} parameters in {stored}"
    )
    if args.dry_run:
        check_destination(args.destination, args.overwrite, source=folder.path, needed=size)
        quantisation = None if scheme is None else scheme.name
        plan = {
            "destination": args.destination,
            "bytes": size,
            "dtype": kind.name,
            "quantisation": quantisation,
            "written": False,
        }
        note(f"would write {human_size(size)} in {written}")
        print(json.dumps(plan, ensure_ascii=False))
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
    note(f"wrote {human_size(size)} in {written}")
    print(args.destination)


if __name__ == "__main__":
    interrupt.run(main)
