"""Flags of the commands that train, except those of the data. Imports no jax."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from glm2_jax.choices import REMAT
from glm2_jax.cli.arguments import above_zero, number, path_argument, positive, random_seed
from glm2_jax.cli.files import BUCKET, refuse_url
from glm2_jax.cli.parser import flag

SCHEDULES = ("cosine", "linear", "constant")
NAN_POLICIES = ("abort", "skip")
ATTENTION = ("usual", "xla", "cudnn", "triton", "splash")
RATE = (
    "highest learning rate (default: {:g} at a hidden size of 4096, and in inverse proportion to "
    "it)"
)
TUNED = (
    "what --grad-checkpoint and --attention are without a flag: auto = as infer.tune measured on "
    "this device, nothing is measured now; off = as if nothing were measured; or a file of "
    "infer.tune"
)
_count = partial(flag, type=positive, metavar="N")
_number = partial(flag, type=number, metavar="X")
_file = partial(flag, type=path_argument, metavar="FILE")
_above_zero = partial(flag, type=above_zero, metavar="X")


def checkpoint_place(text: str) -> str:
    """Check a path of the file system, or gs://BUCKET/PATH, as an argparse type."""
    if not text.startswith(BUCKET):
        refuse_url(text)
    if not text.removeprefix(BUCKET).strip("/ "):
        raise argparse.ArgumentTypeError("it must be a folder, or gs://BUCKET/PATH")
    return text


class _Remat(argparse.Action):
    """Stores one of `REMAT`: "full" for the flag alone, "none" for the flag with --no-."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        names = [*option_strings, *(f"--no-{name.removeprefix('--')}" for name in option_strings)]
        more = {"nargs": "?", "const": REMAT[-1], "choices": REMAT, "type": _remat}
        super().__init__(names, dest, **options, **more)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        no = (option_string or "").startswith("--no-")
        if no and values != self.const:
            raise argparse.ArgumentError(self, f"takes no value, got {values}")
        setattr(namespace, self.dest, REMAT[0] if no else values)


def _remat(text: str) -> str:
    return {"true": REMAT[-1], "false": REMAT[0]}.get(text, text)  # of a recipe


def remat_flag(default: str) -> Any:
    """Return the field of --grad-checkpoint, whose help says what happens without it."""
    return flag(
        "gradient checkpointing: recompute activations in the backward pass to save memory: "
        "products = those between the matrix products, attention = also the MLP's products, full "
        f"(the flag alone) = everything in a layer, none = nothing (default: {default})",
        action=_Remat, metavar="|".join(REMAT[1:]),
    )  # fmt: skip


@dataclass(frozen=True)
class AdapterOptions:
    """The adapter; None = the value of NEW_ADAPTER, or that of `init_adapter`."""

    rank: int | None = _count("rank of the adapter (default: 8)")
    alpha: float | None = _above_zero("alpha: the adapter is scaled by alpha / rank (default: 32)")
    dropout: float = _number("dropout of the adapter's input", default=0.1)
    target: str | None = flag(
        "matrices to adapt, by their published names, separated by commas, or attn "
        "(query_key_value), attn+mlp, all-linear (default: attn)",
        metavar="NAMES",
    )
    rslora: bool | None = flag(
        "rsLoRA: scale by alpha / sqrt(rank)", action="store_const", const=True
    )
    dora: bool | None = flag(
        "DoRA: also train the length of every row of the matrices", action="store_const", const=True
    )
    lora_plus_ratio: float | None = _above_zero(
        "LoRA+: the learning rate of B, and of DoRA's lengths, is this many times that of A "
        "(default: 1)"
    )
    init_adapter: str | None = flag(
        "continue from this adapter, with its rank, alpha, matrices, rsLoRA and DoRA; other "
        "values of these flags are refused",
        type=path_argument, metavar="DIR",
    )  # fmt: skip
    force_adapter: bool = flag(
        "accept an --init-adapter that was trained on another base model or template",
        action="store_true",
    )


NEW_ADAPTER: dict[str, Any] = {"rank": 8, "alpha": 32, "target": "attn", "rslora": False}


@dataclass(frozen=True)
class PrefixOptions:
    """The P-Tuning v2 prefix, by the names of the official training."""

    pre_seq_len: int = _count("prefix tokens", default=128)
    prefix_projection: bool = flag(
        "compute the prefix by two linear layers with a tanh between them, which are trained, too",
        action="store_true",
    )
    dropout: float = _number("dropout of the prefix's keys and values", default=0.1)


@dataclass(frozen=True)
class PreferenceOptions:
    """What is learned from pairs of answers."""

    loss: str = flag(
        "dpo = compared with the model without the adapter; orpo = by the odds of both answers, "
        "together with the loss of the chosen one",
        choices=("dpo", "orpo"), default="dpo",
    )  # fmt: skip
    beta: float = _above_zero(
        "strength of the preference: the factor of DPO's margin, or of ORPO's odds ratio loss",
        default=0.1,
    )


@dataclass(frozen=True)
class TrainingOptions:
    """The optimizer and its batches."""

    lr: float | None = _number(RATE)
    schedule: str = flag("decay after the warm-up", choices=SCHEDULES, default="cosine")
    warmup: float = _number(
        "warm-up steps; below 1: this share of all steps; 0 = off", default=0.03
    )
    epochs: float | None = _above_zero(
        "passes over the data (default: 3, more where that is less than 200 optimizer steps)",
        exclusive=True,
    )
    steps: int | None = _count("optimizer steps, instead of --epochs", exclusive=True)
    batch_size: int = _count("rows per micro-batch", default=4)
    grad_accum: int | None = _count(
        "micro-batches per optimizer step (default: 8, fewer where 3 epochs are less than 200 "
        "steps)"
    )
    clip: float = _number("clip gradients to this global norm; 0 = off", default=1.0)
    weight_decay: float = _number("weight decay of AdamW", default=0.0)
    neftune: float = _number(
        "NEFTune noise on the embeddings, with this alpha; 0 = off", default=0.0
    )
    seed: int = flag("random seed", type=random_seed, default=0, metavar="N")
    nan_policy: str = flag(
        "if loss or gradient is NaN or infinite: abort the run, or skip the step",
        choices=NAN_POLICIES, default="abort",
    )  # fmt: skip
    stop_diverged: str = flag(
        "stop a run whose loss stays far above its lowest, with exit code 3",
        choices=("on", "off"), default="on",
    )  # fmt: skip
    grad_checkpoint: str | None = remat_flag(
        "of what fits the memory the fastest, as infer.tune --train measured on this device; "
        "without that, none if it fits, else full; on a mesh: full for an adapter, else none"
    )
    attention: str | None = flag(
        "form of attention (default: the one that infer.tune measured as the fastest on this "
        "device; without that, and on a mesh, the usual one)",
        choices=ATTENTION,
    )


@dataclass(frozen=True)
class EvaluationOptions:
    """The evaluation during training."""

    val_data: str | None = _file("validation rows, which are not trained on", exclusive=True)
    val_split: float = _number(
        "take this share of the rows of --data for validation; 0 = none",
        default=0.0, exclusive=True,
    )  # fmt: skip
    eval_every: int | None = _count("steps between evaluations (default: only at the end)")
    early_stop: int | None = _count(
        "stop after N evaluations without a lower validation loss, and keep the best"
    )
    guard_data: str | None = _file(
        "general rows whose loss is also computed: it rises when the model forgets"
    )
    sample_prompts: str | None = _file("prompts, one per line, to answer at each evaluation")


@dataclass(frozen=True)
class OutputOptions:
    """The result, the checkpoints and the log."""

    output: str = flag(
        "folder of the result and its checkpoints",
        short=("-o",), type=path_argument, metavar="DIR",
    )  # fmt: skip
    resume: str = flag(
        "auto = resume the run in --output if there is one",
        choices=("auto", "none"), default="none",
    )  # fmt: skip
    checkpoints: str | None = flag(
        "store the checkpoints here instead of in --output, for hosts without a shared folder: in "
        "a bucket of Google Cloud Storage (needs gcsfs; tested with an emulator, not with a real "
        "bucket)",
        type=checkpoint_place, metavar="DIR|gs://...",
    )  # fmt: skip
    save_every: int = _count("steps between checkpoints", default=200)
    keep: int = _count("how many of the newest checkpoints to keep", default=2)
    log_every: int = _count(
        "steps between log lines; the first and the last step are always logged", default=10
    )
    log_jsonl: str | None = _file("write the log as JSON lines (default: OUTPUT/log.jsonl)")
    plot: str | None = flag(
        "draw the loss curve, with --check-data the lengths of the rows (needs matplotlib; also "
        ".svg, .pdf)",
        type=path_argument, metavar="FILE.png",
    )  # fmt: skip
