"""`python -m convert.to_pytorch SRC DST --layout glm`: write a folder for PyTorch programs."""

from functools import partial

from convert import options
from glm2_jax.choices import LAYOUTS
from glm2_jax.cli import interrupt
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags


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
    from convert.layouts.names import SCALE
    from convert.writing.own import write_folder
    from convert.writing.pytorch import plan_export
    from glm2_jax.schemes import stored_as

    folder, adapter = options.open_source(from_flags(ModelChoice, args), args.source)
    dtype, lora = None if args.dtype == "keep" else args.dtype, adapter and adapter.lora
    plan = plan_export(folder, args.layout, dtype, lora, args.dequantize)
    dtype, written = plan.dtype.name, stored_as(plan.dtype.name, plan.scheme)
    warnings = []
    if args.layout == "glm" and folder.config.rope_table_dtype != "float32":
        warnings += ["the rotary tables of GlmForCausalLM are float32; the requested ones are not"]
    if any(x.name.endswith(SCALE) and x.dtype != plan.dtype for x in plan.entries):
        warnings += [f"the scales are written in float32: {dtype} does not hold them exactly"]
    packed = plan.scheme is not None
    options.print_model(args.source, folder, adapter, written, *warnings, packed=packed)
    write = partial(write_folder, args.destination, plan, max_shard_size=args.max_shard_size)
    form = f"{written}, layout {args.layout}"
    options.write(
        write, args.destination, plan.nbytes, form, dry_run=args.dry_run, source=folder.path
    )


if __name__ == "__main__":
    interrupt.run(main)
