"""`python -m convert.to_gguf SRC DST --type f16|q8_0`: write one file for llama.cpp."""

from functools import partial

from convert import options
from glm2_jax.choices import GGUF_TYPES
from glm2_jax.cli import interrupt
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags


def build_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m convert.to_gguf",
        description=(
            "Writes any checkpoint folder that this project reads as one GGUF file for llama.cpp, "
            "with its vocabulary. Quantized weights are dequantized first. The new file appears "
            "complete or not at all."
        ),
        example="python -m convert.to_gguf ./chatglm2-6b chatglm2-6b-q8_0.gguf --type q8_0",
    )
    options.add_places(parser, destination="the file to write")
    form = parser.add_argument_group("form")
    form.add_argument(
        "--type", choices=GGUF_TYPES, required=True,
        help="type of the matrices: f16, 16 bits per weight; q8_0, 8.5 bits (rows that are not a "
        "multiple of 32 stay f16); norms and biases are float32",
    )  # fmt: skip
    options.add_adapter_flags(parser)
    options.add_last(parser)
    return parser


def main(argv: list[str]) -> None:
    """Parse the flags and write."""
    args = build_parser().parse_args(argv)
    from convert.writing.gguf import export_gguf, gguf_tensors, require_gguf

    require_gguf()  # before a model is downloaded
    folder, adapter = options.open_source(from_flags(ModelChoice, args), args.source)
    lora = adapter.lora if adapter else None
    tensors = gguf_tensors(folder, args.type, lora)
    size = sum(tensor.nbytes for tensor in tensors)
    warnings = []
    left = [tensor for tensor in tensors if args.type == "q8_0" and tensor.kind.name == "F16"]
    if left:
        columns = sorted({tensor.source.shape[-1] for tensor in left})
        kinds = sorted({tensor.name.split(".")[-2] for tensor in left})
        warnings.append(
            f"{len(left)} tensors stay f16: q8_0 needs rows that are a multiple of 32, theirs "
            f"have {', '.join(map(str, columns))} ({', '.join(kinds)})"
        )
    if folder.config.rope_table_dtype != "float32":
        warnings.append("the rotary angles of llama.cpp are float32; the requested ones are not")
    written = "float16" if args.type == "f16" else args.type
    options.print_model(args.source, folder, adapter, written, *warnings)
    write = partial(export_gguf, folder, args.destination, kind=args.type, lora=lora)
    options.write(write, args.destination, size, args.type, dry_run=args.dry_run, file=True)


if __name__ == "__main__":
    interrupt.run(main)
