"""`python -m convert.to_pytorch SRC DST --layout glm`: a folder that PyTorch programs load."""

import json
from typing import TYPE_CHECKING

from convert import interrupt
from convert.cli import Parser, Progress, human_size, note, path_argument, size_argument
from convert.from_pytorch import DTYPES, add_model_flags
from convert.hub import find_model

if TYPE_CHECKING:
    from convert.folder import Folder
    from glm2_jax.schemes import Scheme

# Spelt out here, and compared with the library's list in a test, so that --help needs no jax.
LAYOUTS = ("glm", "chatglm")


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="python -m convert.to_pytorch",
        description=(
            "Writes any checkpoint folder that this project reads for PyTorch programs, as "
            "safetensors (.bin is not written). Quantised weights are dequantised, except where "
            "--layout chatglm has the same form. The new folder appears complete or not at all."
        ),
        example="python -m convert.to_pytorch ./chatglm2-6b-jax ./chatglm2-6b-glm --layout glm",
    )
    parser.add_argument(
        "source", metavar="SRC", type=path_argument, help="the folder to read, or OWNER/NAME"
    )
    parser.add_argument("destination", metavar="DST", type=path_argument, help="the one to write")
    form = parser.add_argument_group("form")
    form.add_argument(
        "--layout", choices=LAYOUTS, required=True,
        help="glm = GlmForCausalLM of transformers, no remote code, with a tokenizer for "
        "AutoTokenizer; chatglm = names and config.json of the official repositories, whose "
        "Python files have to be put beside them",
    )  # fmt: skip
    form.add_argument(
        "--dtype", choices=DTYPES, default="keep", metavar="TYPE",
        help="type to store: keep, float32, bfloat16 or float16",
    )  # fmt: skip
    form.add_argument(
        "--dequantize", action="store_true",
        help="write floats also where the official packed int4 or int8 could be written",
    )  # fmt: skip
    form.add_argument(
        "--max-shard-size", type=size_argument, default="4GB", metavar="SIZE",
        help="largest size of one weight file",
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
    from convert.destination import check_destination
    from convert.export import export_entries, export_folder, packed_scheme
    from convert.folder import open_folder
    from convert.names import SCALE
    from convert.own_format import float_dtype
    from glm2_jax.schemes import stored_as

    dtype = None if args.dtype == "keep" else args.dtype
    path = find_model(args.source, source=args.hub_source, revision=args.revision)
    model = {"rope_kind": args.rope_scaling, "template": args.template}
    folder = open_folder(path, **model)
    adapter = None
    if args.adapter:
        adapter = open_adapter(args.adapter, path, force=args.force_adapter, **model)
    lora = adapter.lora if adapter else None
    entries = export_entries(folder, args.layout, dtype, lora, args.dequantize)
    packed = packed_scheme(folder, args.layout, lora, args.dequantize)
    size = sum(entry.nbytes for entry in entries)
    kind = float_dtype(dtype or folder.float_dtype).name
    note(
        f"{args.source}: {folder.layout}, {folder.config.family}, "
        f"{folder.config.num_params:,} parameters in {folder.stored_dtype}"
    )
    warnings = _warnings(folder, args.layout, kind, packed)
    if any(entry.name.endswith(SCALE) and entry.dtype.name != kind for entry in entries):
        warnings.append(f"the scales are written in float32: {kind} does not hold them exactly")
    for line in (*warnings, *(adapter.notes if adapter else ())):
        note(line)
    if args.dry_run:
        check_destination(args.destination, None, source=folder.path, needed=size)
        plan = {"destination": args.destination, "bytes": size, "written": False}
        print(json.dumps(plan, ensure_ascii=False))
        return
    with Progress("writing", size, show=human_size) as progress:
        export_folder(
            folder,
            args.destination,
            layout=args.layout,
            dtype=dtype,
            lora=lora,
            dequantize=args.dequantize,
            max_shard_size=args.max_shard_size,
            progress=lambda done, _: progress(done),
        )
    merged = f", {', '.join(adapter.targets)} adapted" if adapter else ""
    note(f"wrote {human_size(size)} in {stored_as(kind, packed)}, layout {args.layout}{merged}")
    print(args.destination)


def _warnings(folder: "Folder", layout: str, dtype: str, packed: "Scheme | None") -> list[str]:
    """What the new folder has not kept of the old one, one line each."""
    lines = []
    if folder.scheme is not None and packed is None:
        lines.append(
            f"the weights are stored in {folder.scheme.name}; "
            f"they are written dequantised, in {dtype}"
        )
    elif folder.float_dtype != dtype:
        lines.append(f"the weights are stored in {folder.float_dtype}; written as {dtype}")
    if layout == "glm" and folder.config.rope_table_dtype != "float32":
        lines.append("the rotary tables of GlmForCausalLM are float32; those asked for are not")
    return lines


if __name__ == "__main__":
    interrupt.run(main)
