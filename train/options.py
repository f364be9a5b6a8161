"""Flags that `train.lora` and `train.full` share. Imports no jax."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from glm2_jax.choices import DEVICES, DTYPES
from glm2_jax.cli.arguments import above_zero, number, path_argument, positive, whole
from glm2_jax.cli.files import BUCKET, refuse_url
from glm2_jax.cli.flags import add_mesh_options
from glm2_jax.cli.parser import Parser

SCHEDULES = ("cosine", "linear", "constant")
NAN_POLICIES = ("abort", "skip")
_COUNT: dict[str, Any] = {"type": positive, "metavar": "N"}
_FILE: dict[str, Any] = {"type": path_argument, "metavar": "FILE"}
_NUMBER: dict[str, Any] = {"type": number, "metavar": "X"}


@dataclass(frozen=True)
class TrainingOptions:
    """The flags of `add_training_options`, by their names, without those of the model."""

    lr: float | None
    schedule: str
    warmup: float
    epochs: float | None
    steps: int | None
    batch_size: int
    grad_accum: int | None
    clip: float
    weight_decay: float
    neftune: float
    seed: int
    nan_policy: str
    grad_checkpoint: bool


@dataclass(frozen=True)
class EvaluationOptions:
    """The flags of `add_evaluation_options`, by their names."""

    val_data: str | None
    val_split: float | None
    eval_every: int | None
    early_stop: int | None
    guard_data: str | None
    sample_prompts: str | None


@dataclass(frozen=True)
class OutputOptions:
    """The flags of `add_output_options`, by their names."""

    output: str
    resume: str
    checkpoints: str | None
    save_every: int
    keep: int
    log_every: int
    log_jsonl: str | None
    plot: str | None


def add_training_options(parser: Parser, *, lr: float, remat: bool) -> None:
    """Add the flags for the optimizer and the device; `remat` is the default of
    `--grad-checkpoint`, `lr` that of `--lr` for a wide model."""
    group = parser.add_argument_group("training")
    add = group.add_argument
    add(
        "--lr", **_NUMBER,
        help=f"highest learning rate (default: {lr:g} at a hidden size of 4096, and in inverse "
        "proportion to it)",
    )  # fmt: skip
    add("--schedule", choices=SCHEDULES, default="cosine", help="decay after the warm-up")
    add(
        "--warmup", **_NUMBER, default=0.03,
        help="warm-up steps; below 1: this share of all steps; 0 = off",
    )  # fmt: skip
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=above_zero, metavar="X",
        help="passes over the data (default: 3, more where that is less than 200 optimizer steps)",
    )  # fmt: skip
    length.add_argument("--steps", **_COUNT, help="optimizer steps, instead of --epochs")
    add("--batch-size", **_COUNT, default=4, help="rows per micro-batch")
    add(
        "--grad-accum", **_COUNT,
        help="micro-batches per optimizer step (default: 8, fewer where 3 epochs are less than "
        "200 steps)",
    )  # fmt: skip
    add("--clip", **_NUMBER, default=1.0, help="clip gradients to this global norm; 0 = off")
    add("--weight-decay", **_NUMBER, default=0.0, help="weight decay of AdamW")
    add(
        "--neftune", **_NUMBER, default=0.0,
        help="NEFTune noise on the embeddings, with this alpha; 0 = off",
    )  # fmt: skip
    add("--seed", type=whole, default=0, metavar="N", help="random seed")
    add(
        "--nan-policy", choices=NAN_POLICIES, default="abort",
        help="if loss or gradient is NaN or infinite: abort the run, or skip the step",
    )  # fmt: skip
    add(
        "--grad-checkpoint", action=argparse.BooleanOptionalAction, default=remat,
        help="gradient checkpointing: recompute activations in the backward pass to save memory",
    )  # fmt: skip
    group = parser.add_argument_group("performance")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", metavar="TYPE",
        help="compute in this dtype, one of %(choices)s; auto = bfloat16 on TPU and GPUs that "
        "support it, float16 with loss scaling on older GPUs, float32 on CPU where it fits",
    )  # fmt: skip
    group.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    add_mesh_options(group)
    group.add_argument(
        "--compile-cache", type=path_argument, metavar="DIR|off",
        help="folder of compiled programs (default: the user's cache folder)",
    )  # fmt: skip


def add_evaluation_options(parser: Parser) -> None:
    """Add the flags for evaluation during training."""
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    source = group.add_mutually_exclusive_group()
    source.add_argument("--val-data", **_FILE, help="validation rows, which are not trained on")
    source.add_argument(
        "--val-split", **_NUMBER, default=0.0,
        help="take this share of the rows of --data for validation; 0 = none",
    )  # fmt: skip
    add("--eval-every", **_COUNT, help="steps between evaluations (default: only at the end)")
    add(
        "--early-stop", **_COUNT,
        help="stop after N evaluations without a lower validation loss, and keep the best",
    )  # fmt: skip
    add(
        "--guard-data", **_FILE,
        help="general rows whose loss is also computed: it rises when the model forgets",
    )  # fmt: skip
    add("--sample-prompts", **_FILE, help="prompts, one per line, to answer at each evaluation")


def add_output_options(parser: Parser, default: str) -> None:
    """Add the flags for the result, checkpoints and the log."""
    add = parser.add_argument_group("output").add_argument
    add(
        "--output", "-o", type=path_argument, default=default, metavar="DIR",
        help="folder of the result and its checkpoints",
    )  # fmt: skip
    add(
        "--resume", choices=("auto", "none"), default="none",
        help="auto = resume the run in --output if there is one",
    )  # fmt: skip
    add(
        "--checkpoints", type=checkpoint_place, metavar="DIR|gs://...",
        help="store the checkpoints here instead of in --output, for hosts without a shared "
        "folder: in a bucket of Google Cloud Storage (extra gcs; tested with an emulator, not "
        "with a real bucket)",
    )  # fmt: skip
    add("--save-every", **_COUNT, default=200, help="steps between checkpoints")
    add("--keep", **_COUNT, default=2, help="how many of the newest checkpoints to keep")
    add(
        "--log-every", **_COUNT, default=10,
        help="steps between log lines; the first and the last step are always logged",
    )  # fmt: skip
    add("--log-jsonl", **_FILE, help="write the log as JSON lines (default: OUTPUT/log.jsonl)")
    add(
        "--plot", type=path_argument, metavar="FILE.png",
        help="draw the loss curve, with --check-data the lengths of the rows (extra plot; also "
        ".svg, .pdf)",
    )  # fmt: skip


def checkpoint_place(text: str) -> str:
    """Check a path of the file system, or gs://BUCKET/PATH, as an argparse type."""
    if not text.startswith(BUCKET):
        refuse_url(text)
    if not text.removeprefix(BUCKET).strip("/ "):
        raise argparse.ArgumentTypeError("it must be a folder, or gs://BUCKET/PATH")
    return text
