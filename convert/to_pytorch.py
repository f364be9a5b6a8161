"""`python -m convert.to_pytorch SRC DST --layout glm`: a folder that PyTorch programs load."""

from typing import TYPE_CHECKING

from convert import options
from glm2_jax.choices import LAYOUTS
from glm2_jax.cli import interrupt
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags

if TYPE_CHECKING:
    from convert.loading.folder import Folder
    from glm2_jax.schemes import Scheme


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="python -m convert.to_pytorch",
        description=(
            "Writes any checkpoint folder that this project reads for PyTorch programs, as "
            "safetensors (.bin is not written). Quantized weights are dequantized, except where "
            "--layout chatglm has the same form. The new folder appears complete or not at all."
        ),
        example="python -m convert.to_pytorch ./chatglm2-6b-jax ./chatglm2-6b-glm --layout glm",
    )
    options.add_places(parser)
    form = parser.add_argument_group("form")
    form.add_argument(
        "--layout", choices=LAYOUTS, required=True,
        help="glm = GlmForCausalLM of transformers, no remote code, with a tokenizer for "
        "AutoTokenizer; chatglm = names and config.json of the official repositories, whose "
        "Python files have to be put beside them",
    )  # fmt: skip
    options.add_dtype(form)
    form.add_argument(
        "--dequantize", action="store_true",
        help="write floats also where the official packed int4 or int8 could be written",
    )  # fmt: skip
    options.add_shard_size(form)
    options.add_adapter_flags(parser)
    options.add_model_flags(parser)
    options.add_dry_run(parser.add_argument_group("writing"))
    parser.add_common()
    return parser


def main(argv: list[str]) -> None:
    """Parses and writes."""
    args = build_parser().parse_args(argv)
    choice = from_flags(ModelChoice, args)
    from convert.layouts.names import SCALE
    from convert.loading.folder import open_folder
    from convert.writing.destination import check_destination
    from convert.writing.own import float_dtype
    from convert.writing.pytorch import export_entries, export_folder, packed_scheme
    from glm2_jax.schemes import stored_as

    dtype = None if args.dtype == "keep" else args.dtype
    path = options.find_folder(choice, args.source)
    folder = open_folder(path, **choice.form)
    adapter = options.open_merged(choice, path)
    lora = adapter.lora if adapter else None
    entries = export_entries(folder, args.layout, dtype, lora, args.dequantize)
    packed = packed_scheme(folder, args.layout, lora, args.dequantize)
    size = sum(entry.nbytes for entry in entries)
    kind = float_dtype(dtype or folder.float_dtype).name
    options.tell_model(args.source, folder, folder.stored_dtype)
    warnings = _warnings(folder, args.layout, kind, packed)
    if any(entry.name.endswith(SCALE) and entry.dtype.name != kind for entry in entries):
        warnings.append(f"the scales are written in float32: {kind} does not hold them exactly")
    for line in (*warnings, *(adapter.notes if adapter else ())):
        note(line)
    if args.dry_run:
        check_destination(args.destination, None, source=folder.path, needed=size)
        options.print_plan(args.destination, size)
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
    form = f"{stored_as(kind, packed)}, layout {args.layout}"
    options.tell_written(human_size(size), args.destination, form, adapter)


def _warnings(folder: "Folder", layout: str, dtype: str, packed: "Scheme | None") -> list[str]:
    """What the new folder has not kept of the old one, one line each."""
    lines = []
    if folder.scheme is not None and packed is None:
        lines.append(
            f"the weights are stored in {folder.scheme.name}; "
            f"they are written dequantized, in {dtype}"
        )
    elif folder.float_dtype != dtype:
        lines.append(f"the weights are stored in {folder.float_dtype}; written as {dtype}")
    if layout == "glm" and folder.config.rope_table_dtype != "float32":
        lines.append("the rotary tables of GlmForCausalLM are float32; those asked for are not")
    return lines


if __name__ == "__main__":
    interrupt.run(main)
