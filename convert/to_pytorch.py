"""`python -m convert.to_pytorch SRC DST --layout glm`: write a folder for PyTorch programs."""

from typing import TYPE_CHECKING

from convert import options
from glm2_jax.choices import LAYOUTS
from glm2_jax.cli import interrupt
from glm2_jax.cli.messages import Progress, human_size
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags

if TYPE_CHECKING:
    from convert.loading.folder import Folder
    from convert.writing.floats import Plan


def build_parser() -> Parser:
    """Return the parser of the flags."""
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
        "Python files must be added",
    )  # fmt: skip
    options.add_dtype(form)
    form.add_argument(
        "--dequantize", action="store_true",
        help="write floats even where the official packed int4 or int8 could be written",
    )  # fmt: skip
    options.add_adapter_flags(parser)
    options.add_last(parser)
    return parser


def main(argv: list[str]) -> None:
    """Parse the flags and write."""
    args = build_parser().parse_args(argv)
    from convert.writing.destination import check_destination
    from convert.writing.pytorch import export_folder, plan_export
    from glm2_jax.schemes import stored_as

    folder, adapter = options.open_source(from_flags(ModelChoice, args), args.source)
    form = {
        "layout": args.layout,
        "dtype": None if args.dtype == "keep" else args.dtype,
        "lora": adapter.lora if adapter else None,
        "dequantize": args.dequantize,
    }
    plan = plan_export(folder, **form)
    options.print_model(args.source, folder, adapter, *_warnings(folder, args.layout, plan))
    if args.dry_run:
        check_destination(args.destination, None, source=folder.path, needed=plan.nbytes)
        options.print_plan(args.destination, plan.nbytes)
        return
    with Progress("writing", show=human_size) as bar:
        export_folder(
            folder,
            args.destination,
            **form,
            max_shard_size=args.max_shard_size,
            progress=bar.update,
        )
    written = f"{stored_as(plan.dtype.name, plan.scheme)}, layout {args.layout}"
    options.print_written(plan.nbytes, args.destination, written)


def _warnings(folder: "Folder", layout: str, plan: "Plan") -> list[str]:
    """Return what the new folder has not kept of the old one, one line each."""
    from convert.layouts.names import SCALE

    lines, dtype = [], plan.dtype.name
    if folder.scheme is not None and plan.scheme is None:
        lines.append(
            f"the weights are stored in {folder.scheme.name}; "
            f"they are written dequantized, in {dtype}"
        )
    elif folder.float_dtype != dtype:
        lines.append(f"the weights are stored in {folder.float_dtype}; written as {dtype}")
    if layout == "glm" and folder.config.rope_table_dtype != "float32":
        lines.append("the rotary tables of GlmForCausalLM are float32; the requested ones are not")
    if any(x.name.endswith(SCALE) and x.dtype != plan.dtype for x in plan.entries):
        lines.append(f"the scales are written in float32: {dtype} does not hold them exactly")
    return lines


if __name__ == "__main__":
    interrupt.run(main)
