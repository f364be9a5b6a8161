"""`python -m convert.to_gguf SRC DST --type f16|q8_0`: one file that llama.cpp runs."""

from typing import TYPE_CHECKING

from convert import options
from glm2_jax.choices import GGUF_TYPES
from glm2_jax.cli import interrupt
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convert.loading.folder import Folder
    from convert.writing.gguf import Tensor


def build_parser() -> Parser:
    """The flags."""
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
        help="of the matrices: f16, 16 bits a weight; q8_0, 8.5 bits (rows that are no multiple "
        "of 32 stay f16); norms and biases are float32",
    )  # fmt: skip
    options.add_adapter_flags(parser)
    options.add_model_flags(parser)
    options.add_dry_run(parser.add_argument_group("writing"))
    parser.add_common()
    return parser


def main(argv: list[str]) -> None:
    """Parses and writes."""
    args = build_parser().parse_args(argv)
    choice = from_flags(ModelChoice, args)
    from convert.loading.folder import open_folder
    from convert.writing.destination import check_model_file
    from convert.writing.gguf import export_gguf, gguf_tensors, require_gguf

    require_gguf()  # before a model is downloaded
    path = options.find_folder(choice, args.source)
    folder = open_folder(path, **choice.form)
    adapter = options.open_merged(choice, path)
    lora = adapter.lora if adapter else None
    tensors = gguf_tensors(folder, args.type, lora)
    size = sum(tensor.nbytes for tensor in tensors)
    options.tell_model(args.source, folder, folder.stored_dtype)
    for line in (*_warnings(folder, args.type, tensors), *(adapter.notes if adapter else ())):
        note(line)
    if args.dry_run:
        check_model_file(args.destination, needed=size)
        options.print_plan(args.destination, size)
        return
    with Progress("writing", size, show=human_size) as progress:
        export_gguf(
            folder,
            args.destination,
            kind=args.type,
            lora=lora,
            progress=lambda done, _: progress(done),
        )
    options.tell_written(human_size(size), args.destination, args.type, adapter)


def _warnings(folder: "Folder", kind: str, tensors: "Sequence[Tensor]") -> list[str]:
    """What the file has not kept of the folder, one line each."""
    lines = []
    if folder.scheme is not None:
        lines.append(
            f"the weights are stored in {folder.scheme.name}; they are dequantized and written "
            f"as {kind}"
        )
    elif kind == "f16" and folder.stored_dtype != "float16":
        lines.append(f"the weights are stored in {folder.stored_dtype}; written as f16")
    left = [tensor for tensor in tensors if kind == "q8_0" and tensor.kind.name == "F16"]
    if left:
        columns = sorted({tensor.source.shape[-1] for tensor in left})
        lines.append(
            f"{len(left)} tensors stay f16: q8_0 needs rows that are a multiple of 32, theirs "
            f"have {', '.join(map(str, columns))} ({', '.join(sorted(set(map(_stem, left))))})"
        )
    if folder.config.rope_table_dtype != "float32":
        lines.append("the rotary angles of llama.cpp are float32; those asked for are not")
    return lines


def _stem(tensor: "Tensor") -> str:
    """The name without its layer and without "weight"."""
    return tensor.name.split(".")[-2]


if __name__ == "__main__":
    interrupt.run(main)
