"""`python -m convert.to_gguf SRC DST --type f16|q8_0`: one file that llama.cpp runs."""

import json
from typing import TYPE_CHECKING

from convert import interrupt
from convert.cli import Parser, Progress, human_size, note, path_argument
from convert.from_pytorch import add_model_flags
from convert.hub import find_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convert.folder import Folder
    from convert.gguf_layout import Tensor

# Spelt out here, and compared with the library's list in a test, so that --help needs no jax.
TYPES = ("f16", "q8_0")


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="python -m convert.to_gguf",
        description=(
            "Writes any checkpoint folder that this project reads as one GGUF file for llama.cpp, "
            "with its vocabulary. Quantised weights are dequantised first. The new file appears "
            "complete or not at all."
        ),
        example="python -m convert.to_gguf ./chatglm2-6b chatglm2-6b-q8_0.gguf --type q8_0",
    )
    parser.add_argument(
        "source", metavar="SRC", type=path_argument, help="the folder to read, or OWNER/NAME"
    )
    parser.add_argument(
        "destination", metavar="DST", type=path_argument, help="the file to write"
    )  # fmt: skip
    form = parser.add_argument_group("form")
    form.add_argument(
        "--type", choices=TYPES, required=True,
        help="of the matrices: f16, 16 bits a weight; q8_0, 8.5 bits (rows that are no multiple "
        "of 32 stay f16); norms and biases are float32",
    )  # fmt: skip
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--adapter", type=path_argument, metavar="DIR",
        help="merge a LoRA adapter into the weights, in float32",
    )  # fmt: skip
    adapter.add_argument(
        "--force-adapter", action="store_true",
        help="take the adapter though it was trained on another base model or prompt template",
    )  # fmt: skip
    add_model_flags(parser)
    writing = parser.add_argument_group("writing")
    writing.add_argument(
        "--dry-run", action="store_true", help="check the source and say what would be written"
    )
    parser.add_common()
    return parser


def main(argv: list[str]) -> None:
    """Parses and writes."""
    args = build_parser().parse_args(argv)
    from convert.adapted import open_adapter
    from convert.destination import check_model_file
    from convert.folder import open_folder
    from convert.gguf_export import export_gguf
    from convert.gguf_layout import gguf_tensors, require_gguf

    require_gguf()  # before a model is downloaded
    path = find_model(args.source, source=args.hub_source, revision=args.revision)
    model = {"rope_kind": args.rope_scaling, "template": args.template}
    folder = open_folder(path, **model)
    adapter = None
    if args.adapter:
        adapter = open_adapter(args.adapter, path, force=args.force_adapter, **model)
    lora = adapter.lora if adapter else None
    tensors = gguf_tensors(folder, args.type, lora)
    size = sum(tensor.nbytes for tensor in tensors)
    note(
        f"{args.source}: {folder.layout}, {folder.config.family}, "
        f"{folder.config.num_params:,} parameters in {folder.stored_dtype}"
    )
    for line in (*_warnings(folder, args.type, tensors), *(adapter.notes if adapter else ())):
        note(line)
    if args.dry_run:
        check_model_file(args.destination, needed=size)
        plan = {"destination": args.destination, "bytes": size, "written": False}
        print(json.dumps(plan, ensure_ascii=False))
        return
    with Progress("writing", size, show=human_size) as progress:
        export_gguf(
            folder,
            args.destination,
            kind=args.type,
            lora=lora,
            progress=lambda done, _: progress(done),
        )
    merged = f", {', '.join(adapter.targets)} adapted" if adapter else ""
    note(f"wrote {human_size(size)} in {args.type}{merged}")
    print(args.destination)


def _warnings(folder: "Folder", kind: str, tensors: "Sequence[Tensor]") -> list[str]:
    """What the file has not kept of the folder, one line each."""
    lines = []
    if folder.scheme is not None:
        lines.append(
            f"the weights are stored in {folder.scheme.name}; they are dequantised and written "
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
