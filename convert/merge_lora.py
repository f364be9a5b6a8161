"""`python -m convert.merge_lora BASE ADAPTER DST`: a base and its LoRA adapter become one model."""

import argparse
import json
import math
from pathlib import Path

from convert import interrupt
from convert.cli import Parser, Progress, human_size, note, path_argument, size_argument
from convert.from_pytorch import DTYPES, add_model_flags
from convert.hub import find_model

DEVICES = ("cpu", "gpu", "tpu")


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
    weights.add_argument(
        "--dtype", choices=DTYPES, default="keep", metavar="TYPE",
        help="type to store: keep, float32, bfloat16 or float16",
    )  # fmt: skip
    weights.add_argument(
        "--dequantize", action="store_true",
        help="allow a quantised base; its weights are written unpacked",
    )  # fmt: skip
    weights.add_argument(
        "--max-shard-size", type=size_argument, default="4GB", metavar="SIZE",
        help="largest size of one weight file",
    )  # fmt: skip
    weights.add_argument(
        "--force-adapter", action="store_true",
        help="take the adapter though it was trained on another base model or prompt template",
    )  # fmt: skip
    checking = parser.add_argument_group("check")
    checking.add_argument(
        "--bound", type=_bound, metavar="X",
        help="largest difference of a logit that is accepted (default: 0.001 in float32, 0.125 in "
        "float16, 1 in bfloat16)",
    )  # fmt: skip
    checking.add_argument(
        "--device", choices=DEVICES,
        help="where the logits are computed (default: the device that jax prefers)",
    )  # fmt: skip
    checking.add_argument(
        "--skip-check", action="store_true",
        help="merge without comparing: for machines that cannot hold the model in --dtype",
    )  # fmt: skip
    add_model_flags(parser)
    writing = parser.add_argument_group("writing")
    writing.add_argument(
        "--overwrite", action="store_true",
        help="replace DST if it is a folder of this format; the old one goes at the very end",
    )  # fmt: skip
    writing.add_argument(
        "--dry-run",
        action="store_true",
        help="check base and adapter and say what would be written",
    )
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
    from convert.adapted import open_adapter
    from convert.destination import check_destination
    from convert.folder import open_folder
    from convert.merge_check import BOUNDS, MergeCheck
    from convert.own_format import convert_folder, float_dtype, size_of_conversion

    path = find_model(args.base, source=args.hub_source, revision=args.revision)
    model = {"rope_kind": args.rope_scaling, "template": args.template}
    folder = open_folder(path, **model)
    adapter = open_adapter(args.adapter, path, force=args.force_adapter, **model)
    kind = float_dtype(folder.float_dtype if args.dtype == "keep" else args.dtype).name
    form = {"dtype": kind, "quantize": "none" if args.dequantize else None, "adapter": adapter}
    size = size_of_conversion(folder, **form)
    check_destination(args.destination, args.overwrite, source=folder.path, needed=size)
    note(
        f"{args.base}: {folder.layout}, {folder.config.family}, {folder.config.num_params:,} "
        f"parameters in {folder.stored_dtype}; {', '.join(adapter.targets)} adapted"
    )
    for line in adapter.notes:
        note(line)
    if args.dry_run:
        plan = {"destination": args.destination, "bytes": size, "written": False}
        print(json.dumps(plan, ensure_ascii=False))
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
    note(f"wrote {human_size(size)} in {kind}")
    print(args.destination)


if __name__ == "__main__":
    interrupt.run(main)
