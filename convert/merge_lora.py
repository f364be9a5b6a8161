"""`python -m convert.merge_lora BASE ADAPTER DST`: merge a LoRA adapter into its base."""

from collections.abc import Callable
from pathlib import Path

from convert import options
from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import device_argument, number, path_argument
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags


def build_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m convert.merge_lora",
        description=(
            "Merges a LoRA adapter into its base, in float32, and writes a folder of this "
            "project's format. The logits of fixed prompts are compared with those of base and "
            "adapter; if they differ by more than a bound, no output remains."
        ),
        example="python -m convert.merge_lora ./chatglm2-6b ./my-adapter ./chatglm2-6b-mine",
    )
    parser.add_argument(
        "base", metavar="BASE", type=path_argument, help="the model's folder, OWNER/NAME, or demo"
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", type=path_argument, help="the adapter's folder"
    )
    parser.add_argument(
        "destination", metavar="DST", type=path_argument, help="the folder to write"
    )
    weights = parser.add_argument_group("weights")
    options.add_dtype(weights)
    weights.add_argument(
        "--dequantize", action="store_true",
        help="allow a quantized base; its weights are written as floats",
    )  # fmt: skip
    options.add_adapter_flags(parser, named=True)
    checking = parser.add_argument_group("check")
    checking.add_argument(
        "--bound", type=number, metavar="X",
        help="largest accepted difference of a logit (default: 0.001 in float32, 0.125 in "
        "float16, 1 in bfloat16)",
    )  # fmt: skip
    checking.add_argument(
        "--device", type=device_argument, default="auto", metavar="DEVICE",
        help="where the logits are computed: auto, cpu, gpu, tpu",
    )  # fmt: skip
    checking.add_argument(
        "--skip-check", action="store_true",
        help="merge without comparing: for machines that cannot hold the model in --dtype",
    )  # fmt: skip
    options.add_last(parser, "base and adapter", overwrite=True)
    return parser


def main(argv: list[str]) -> None:
    """Parse the flags and merge."""
    args = build_parser().parse_args(argv)
    from convert.writing.merge_check import BOUNDS, MergeCheck
    from convert.writing.own import plan_conversion, write_folder

    folder, adapter = options.open_source(from_flags(ModelChoice, args), args.base)
    assert adapter is not None
    dtype, quantize = None if args.dtype == "keep" else args.dtype, None
    if args.dequantize:
        quantize = "none"
    plan = plan_conversion(folder, dtype, quantize, adapter=adapter)
    dtype = plan.dtype.name
    options.print_model(args.base, folder, adapter, dtype)

    def merge(progress: Callable[[int, int], None]) -> None:
        check = None
        if not args.skip_check:  # first: too little memory is known before anything is written
            with Progress("loading", show=human_size) as bar:
                check = MergeCheck(folder, adapter, dtype, device=args.device, progress=bar.update)

        def compare(merged: Path) -> None:
            if check is None:
                note("not compared with base and adapter (--skip-check)")
                return
            bound = BOUNDS[dtype] if args.bound is None else args.bound
            with Progress("loading the merged model", show=human_size) as bar:
                found = check.require(merged, bound, bar.update)
            note(
                f"largest logit difference between merged and unmerged: {found:.3g} "
                f"(the adapter changes logits by up to {check.effect:.3g})"
            )
            if check.effect <= bound:  # leaving the adapter out would pass, too
                note(f"the adapter changes less than the bound, {bound:.3g}, so this shows little")

        shards = {"max_shard_size": args.max_shard_size, "progress": progress}
        write_folder(args.destination, plan, check=compare, overwrite=args.overwrite, **shards)

    where = {"overwrite": args.overwrite, "source": folder.path}
    options.write(merge, args.destination, plan.nbytes, dtype, dry_run=args.dry_run, **where)


if __name__ == "__main__":
    interrupt.run(main)
