"""The names that flags have in other programs: in transformers and PEFT, in LLaMA-Factory, in the
official training of ChatGLM2, in vLLM; and ours, where one of a command does the same."""

from collections.abc import Container

_THEIRS = {
    "--model": (
        "model-name-or-path", "model-path", "model-id", "base-model", "pretrained-model",
    ),
    "--adapter": ("adapter-name-or-path", "adapter-model", "lora-path", "lora-weights"),
    "--init-adapter": ("adapter-name-or-path", "lora-weights"),
    "--prefix": ("ptuning-checkpoint",),
    "--data": ("dataset", "train-file", "train-data", "data-path"),
    "--val-data": ("validation-file", "eval-dataset", "eval-file"),
    "--val-split": ("val-size",),
    "--output": ("output-dir", "save-dir"),
    "--resume auto": ("resume-from-checkpoint",),
    "--lr": ("learning-rate",),
    "--schedule": ("lr-scheduler-type", "lr-scheduler"),
    "--warmup": ("warmup-steps", "warmup-ratio"),
    "--epochs": ("num-train-epochs", "num-epochs"),
    "--steps": ("max-steps",),
    "--batch-size": ("per-device-train-batch-size", "train-batch-size", "micro-batch-size"),
    "--grad-accum": ("gradient-accumulation-steps",),
    "--grad-checkpoint": ("gradient-checkpointing",),
    "--clip": ("max-grad-norm",),
    "--neftune": ("neftune-noise-alpha",),
    "--pack": ("packing",),
    "--rank": ("lora-rank", "lora-r"),
    "--alpha": ("lora-alpha",),
    "--dropout": ("lora-dropout",),
    "--target": ("lora-target", "lora-target-modules", "target-modules"),
    "--dora": ("use-dora",),
    "--rslora": ("use-rslora",),
    "--lora-plus-ratio": ("loraplus-lr-ratio",),
    "--beta": ("pref-beta", "dpo-beta"),
    "--loss": ("pref-loss", "loss-type"),
    "--log-every": ("logging-steps",),
    "--save-every": ("save-steps",),
    "--eval-every": ("eval-steps",),
    "--keep": ("save-total-limit",),
    "--quantize": ("quantization-bit", "quantization"),
    "--quantize int8": ("load-in-8bit",),
    "--quantize int4": ("load-in-4bit",),
    "--quantize-base": ("quantization-bit",),
    "--quantize-base int8": ("load-in-8bit",),
    "--quantize-base int4": ("load-in-4bit",),
    "--dtype": ("torch-dtype",),
    "--dtype bfloat16": ("bf16",),
    "--dtype float16": ("fp16",),
    "--max-length": (
        "cutoff-len", "max-seq-length", "max-seq-len", "max-source-length", "max-model-len",
        "ctx-size",
    ),
    "--max-new-tokens": ("max-target-length", "max-output-len", "n-predict"),
    "--new-tokens": ("max-new-tokens", "max-tokens"),
    "--tp": ("tensor-parallel-size",),
    "--slots": ("max-num-seqs",),
}  # fmt: skip


def our_flag(theirs: str, known: Container[str]) -> str | None:
    """Return our flag, one of `known`, for one of another program, with a value where theirs means
    one; None where there is none. Names have hyphens."""
    if theirs in known or not theirs.startswith("--"):  # a value
        return None
    name = theirs.removeprefix("--")
    found = (ours for ours, names in _THEIRS.items() if name in names)
    return next((ours for ours in found if ours.split()[0] in known), None)
