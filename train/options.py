"""Flags that `train.lora` and `train.full` share. Needs no jax."""

from __future__ import annotations

import argparse

from glm2_jax.choices import DEVICES, DTYPES
from glm2_jax.cli.arguments import above_zero, number, path_argument, positive, whole
from glm2_jax.cli.files import BUCKET, refuse_url
from glm2_jax.cli.flags import add_mesh_options
from glm2_jax.cli.parser import Parser

SCHEDULES = ("cosine", "linear", "constant")
NAN_POLICIES = ("abort", "skip")


def checkpoint_place(text: str) -> str:
    """An argparse type: a path of the file system, or gs://BUCKET/PATH."""
    if not text.startswith(BUCKET):
        refuse_url(text)
    if not text.removeprefix(BUCKET).strip("/ "):
        raise argparse.ArgumentTypeError("it has to name a folder, or gs://BUCKET/PATH")
    return text


def add_training_options(parser: Parser, *, lr: float, remat: bool) -> None:
    """How the parameters are changed.

    Args:
        lr: default of `--lr` for a wide model, see `train.defaults`.
        remat: default of `--grad-checkpoint`.
    """
    group = parser.add_argument_group("training")
    add = group.add_argument
    parser.set_defaults(lr_of_wide_model=lr)
    add(
        "--lr", type=number, metavar="X",
        help=f"highest learning rate (default: {lr:g} at a hidden size of 4096, and in inverse "
        "proportion to it)",
    )  # fmt: skip
    add("--schedule", choices=SCHEDULES, default="cosine", help="how it falls after the warm-up")
    add(
        "--warmup", type=number, default=0.03, metavar="X",
        help="steps until the highest learning rate; below 1: this part of all steps; 0: none",
    )  # fmt: skip
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=above_zero, metavar="X",
        help="times over the data (default: 3, more where that is less than 200 optimizer steps)",
    )  # fmt: skip
    length.add_argument("--steps", type=positive, metavar="N", help="optimizer steps instead")
    add("--batch-size", type=positive, default=4, metavar="N", help="rows computed at once")
    add(
        "--grad-accum", type=positive, metavar="N",
        help="micro-batches per optimizer step (default: 8, fewer where 3 epochs are less than "
        "200 steps)",
    )  # fmt: skip
    add("--clip", type=number, default=1.0, metavar="X", help="longest gradient; 0: any")
    add("--weight-decay", type=number, default=0.0, metavar="X", help="of AdamW")
    add(
        "--neftune",
        type=number,
        default=0.0,
        metavar="X",
        help="noise on the embeddings (NEFTune's alpha)",
    )
    add("--seed", type=whole, default=0, metavar="N", help="of order, dropout and new parameters")
    add(
        "--nan-policy", choices=NAN_POLICIES, default="abort",
        help="where loss or gradient is NaN or infinite: end, or leave the step out",
    )  # fmt: skip
    add(
        "--grad-checkpoint", action=argparse.BooleanOptionalAction, default=remat,
        help="compute the layers again for their gradients instead of keeping what they computed",
    )  # fmt: skip
    group = parser.add_argument_group("performance")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", metavar="TYPE",
        help="type to compute in, one of %(choices)s; auto = bfloat16 on TPU and GPUs that have "
        "it, float16 with scaled losses on older GPUs, float32 on CPU where it fits",
    )  # fmt: skip
    group.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    add_mesh_options(group)
    group.add_argument(
        "--compile-cache", type=path_argument, metavar="DIR|off",
        help="where compiled programs are kept (default: the user's cache folder)",
    )  # fmt: skip


def add_evaluation_options(parser: Parser) -> None:
    """What is looked at in between."""
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--val-data",
        type=path_argument,
        metavar="FILE",
        help="rows whose loss is shown, not learned",
    )
    source.add_argument(
        "--val-split", type=number, default=0.0, metavar="X",
        help="take this part of the rows out of --data for it (default: 0, none)",
    )  # fmt: skip
    add(
        "--eval-every",
        type=positive,
        metavar="N",
        help="steps between evaluations (default: at the end)",
    )
    add(
        "--early-stop", type=positive, metavar="N",
        help="end after N evaluations without a lower loss",
    )  # fmt: skip
    add(
        "--guard-data", type=path_argument, metavar="FILE",
        help="general rows whose loss is shown beside: it rises where the model forgets",
    )  # fmt: skip
    add(
        "--sample-prompts", type=path_argument, metavar="FILE",
        help="questions, one a line, that are answered at each evaluation",
    )  # fmt: skip


def add_output_options(parser: Parser, default: str) -> None:
    """Where the result goes, and how often what is kept."""
    group = parser.add_argument_group("output")
    add = group.add_argument
    add(
        "--output",
        "-o",
        type=path_argument,
        default=default,
        metavar="DIR",
        help="folder of the result and of what resuming needs",
    )
    add(
        "--resume", choices=("auto", "none"), default="none",
        help="auto = go on with what --output holds, or begin",
    )  # fmt: skip
    add(
        "--checkpoints", type=checkpoint_place, metavar="DIR|gs://...",
        help="keep the checkpoints of the training there instead of in --output: where several "
        "hosts share no folder, in a bucket of Google Cloud Storage (extra gcs; tried with an "
        "emulator of it, not with a real bucket)",
    )  # fmt: skip
    add("--save-every", type=positive, default=200, metavar="N", help="steps between checkpoints")
    add(
        "--keep",
        type=positive,
        default=2,
        metavar="N",
        help="how many of the newest checkpoints stay",
    )
    add(
        "--log-every",
        type=positive,
        default=10,
        metavar="N",
        help="steps between two lines; the first and the last step have one",
    )
    add(
        "--log-jsonl",
        type=path_argument,
        metavar="FILE",
        help="an object for each line (default: log.jsonl in --output)",
    )
    add(
        "--plot",
        type=path_argument,
        metavar="FILE.png",
        help="the loss curve (extra plot; also .svg, .pdf)",
    )
