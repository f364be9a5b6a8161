"""Reads an adapter_config.json of the PEFT library: what it means here, and what is refused."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.shards import read_json
from glm2_jax.config import shorten
from glm2_jax.errors import CheckpointError
from glm2_jax.lora import scale_of

CONFIG = "adapter_config.json"

# Keys that change nothing about what a finished adapter computes; the tensors tell its targets.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Other ways to begin change the base, too.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
# A file's regular expression may take for ever; one without repetitions cannot.
_PATTERN = re.compile(r"[\w.^$\\-]{1,500}")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The keys that count.

    Attributes:
        rank, alpha: of matrices that no pattern names.
        dropout: rate in training.
        rslora: whether the scale is alpha / sqrt(rank).
        rank_pattern, alpha_pattern: regular expression of a matrix's name -> its own.
        some_layers: whether layers may be without an adapter.
        base: base_model_name_or_path, which nothing vouches for.
    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    some_layers: bool
    base: Any

    def rank_of(self, module: str) -> int:
        """R of the matrix with the full name `module`."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What its B (A x) is multiplied with."""
        alpha = _matching(self.alpha_pattern, module, self.alpha)
        return scale_of(alpha, self.rank_of(module), self.rslora)


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads the configuration of an adapter.

    Raises:
        CheckpointError: absent, not plain LoRA, or values that make no sense.
    """
    path = folder / CONFIG
    if not path.exists():
        kind = "a model" if (folder / "config.json").exists() else "no adapter"
        raise CheckpointError(
            f"{folder} is {kind}: it holds no {CONFIG}.",
            "An adapter is a folder with that file and adapter_model.safetensors.",
            "Give the folder that train.lora or the peft library wrote.",
        )
    raw = read_json(path)
    _refuse_unsupported(folder, raw)
    rank_pattern, alpha_pattern = (_patterns(path, raw, f"{x}_pattern") for x in ("rank", "alpha"))
    ranks = {"r": raw.get("r", 8), **rank_pattern}
    alphas = {"lora_alpha": raw.get("lora_alpha", 8), **alpha_pattern}
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise _wrong(path, name, rank, "A rank is a whole number of 1 or more.")
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise _wrong(path, name, alpha, "alpha is a number.")
    dropout = raw.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise _wrong(path, "lora_dropout", dropout, "A rate is a number from 0 to 1.")
    return PeftConfig(
        rank=ranks.pop("r"),
        alpha=alphas.pop("lora_alpha"),
        dropout=float(dropout),
        rslora=bool(raw.get("use_rslora")),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        some_layers=raw.get("layers_to_transform") is not None,
        base=raw.get("base_model_name_or_path"),
    )


def _refuse_unsupported(folder: Path, raw: Mapping[str, Any]) -> None:
    found = [f"{key} = {shorten(raw[key])}" for key in raw if key not in _HARMLESS and raw[key]]
    if raw.get("peft_type") != "LORA":
        found.insert(0, f"peft_type = {shorten(raw.get('peft_type'))}")
    if raw.get("bias") not in (None, "none"):
        found.append(f"bias = {shorten(raw['bias'])}")
    if raw.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        found.append(f"init_lora_weights = {shorten(raw['init_lora_weights'])}")
    if found:
        raise CheckpointError(
            f"The adapter {folder} needs what is not supported: {', '.join(found[:10])}.",
            "Known is plain LoRA without biases; with rsLoRA, rank and alpha patterns.",
            "Merge it into its base with the peft library, or train it without.",
        )


def _patterns(path: Path, raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    patterns = raw.get(name) or {}
    if not isinstance(patterns, dict):
        raise _wrong(path, name, patterns, "It is an object: a matrix's name and its value.")
    for pattern in patterns:
        try:
            plain = _PATTERN.fullmatch(pattern) and re.compile(pattern)
        except re.error:
            plain = None
        if not plain:
            raise _wrong(path, name, pattern, "Only names are read there, without repetitions.")
    return patterns


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches a name's end at a dot, as in PEFT."""
    found = (x for p, x in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(found, default)


def _wrong(path: Path, name: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} = {shorten(value)} makes no sense.", why, "Save the adapter again."
    )
