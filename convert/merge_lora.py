"""`python -m convert.merge_lora BASE ADAPTER DST`: a base and its LoRA adapter become one model."""

import argparse
import math
from pathlib import Path

from convert import options
from glm2_jax.choices import DEVICES
from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="python -m convert.merge_lora",
        description=(
            "Merges a LoRA adapter into its base, in float32, and writes a folder of this "
            "project's format. Before it appears, logits of fixed prompts are compared with those "
            "of base and adapter; above a bound nothing is left behind."
        ),
        example="python -m convert.merge_lora ./chatglm2-6b ./my-adapter ./chatglm2-6b-mine",
    )
    parser.add_argument(
        "base", metavar="BASE", type=path_argument, help="the model's folder, or OWNER/NAME"
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=path_argument, help="its folder")
    parser.add_argument("destination", metavar="DST", type=path_argument, help="the one to write")
    weights = parser.add_argument_group("weights")
    options.add_dtype(weights)
    weights.add_argument(
        "--dequantize", action="store_true",
        help="allow a quantized base; its weights are written unpacked",
    )  # fmt: skip
    options.add_shard_size(weights)
    options.add_force_adapter(weights)
    checking = parser.add_argument_group("check")
    checking.add_argument(
        "--bound", type=_bound, metavar="X",
        help="largest difference of a logit that is accepted (default: 0.001 in float32, 0.125 in "
        "float16, 1 in bfloat16)",
    )  # fmt: skip
    checking.add_argument(
        "--device", choices=DEVICES, default="auto",
        help="where the logits are computed (default: the device that jax prefers)",
    )  # fmt: skip
    checking.add_argument(
        "--skip-check", action="store_true",
        help="merge without comparing: for machines that cannot hold the model in --dtype",
    )  # fmt: skip
    options.add_model_flags(parser)
    writing = parser.add_argument_group("writing")
    options.add_overwrite(writing)
    options.add_dry_run(writing, "base and adapter")
    parser.add_common()
    return parser


def _bound(text: str) -> float:
    bound = float(text)
    if not 0 <= bound < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return bound


def main(argv: list[str]) -> None:
    """Parses and merges."""
    args = build_parser().parse_args(argv)
    choice = from_flags(ModelChoice, args)
    from convert.adapters.attach import open_adapter
    from convert.loading.folder import open_folder
    from convert.writing.destination import check_destination
    from convert.writing.merge_check import BOUNDS, MergeCheck
    from convert.writing.own import convert_folder, float_dtype, size_of_conversion

    path, model = options.find_folder(choice, args.base), choice.form
    folder = open_folder(path, **model)
    adapter = open_adapter(args.adapter, path, force=args.force_adapter, **model)
    kind = float_dtype(folder.float_dtype if args.dtype == "keep" else args.dtype).name
    form = {"dtype": kind, "quantize": "none" if args.dequantize else None, "adapter": adapter}
    size = size_of_conversion(folder, **form)
    check_destination(args.destination, args.overwrite, source=folder.path, needed=size)
    options.tell_model(
        args.base, folder, folder.stored_dtype, f"; {', '.join(adapter.targets)} adapted"
    )
    for line in adapter.notes:
        note(line)
    if args.dry_run:
        options.print_plan(args.destination, size)
        return
    check = None
    if not args.skip_check:  # first of all: too little memory is known before anything is written
        with Progress("loading", size, show=human_size) as bar:
            check = MergeCheck(
                folder, adapter, kind, device=args.device, progress=lambda done, _: bar(done)
            )

    def compare(merged: Path) -> None:
        if check is None:
            note("not compared with base and adapter (--skip-check)")
            return
        bound = BOUNDS[kind] if args.bound is None else args.bound
        with Progress("loading the merged model", size, show=human_size) as bar:
            found = check.require(merged, bound, lambda done, _: bar(done))
        note(
            f"largest logit difference between merged and unmerged: {found:.3g} "
            f"(the adapter changes logits by up to {check.effect:.3g})"
        )
        if check.weak(bound):
            note(f"the adapter changes less than the bound, {bound:.3g}, so this shows little")

    with Progress("merging", size, show=human_size) as bar:
        convert_folder(
            folder,
            args.destination,
            **form,
            check=compare,
            overwrite=args.overwrite,
            max_shard_size=args.max_shard_size,
            progress=lambda done, _: bar(done),
        )
    options.tell_written(human_size(size), args.destination, kind)


if __name__ == "__main__":
    interrupt.run(main)
