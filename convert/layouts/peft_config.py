"""Reads an adapter_config.json of the PEFT library: what it means here, and what is refused."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convert.files.shards import WEIGHT_FILES, read_json
from convert.layouts.patterns import Pattern, match_names
from glm2_jax.config import shorten
from glm2_jax.errors import CheckpointError
from glm2_jax.lora import scale_of

CONFIG = "adapter_config.json"

# What is adapted, and how strongly; a missing key, null, false and empty values are the default.
_SELECTION = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "r", "lora_alpha",
    "rank_pattern", "alpha_pattern", "use_rslora",
)  # fmt: skip
# Keys that change nothing about what a finished adapter computes.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "fan_in_fan_out", "inference_mode", "init_lora_weights", "loftq_config",
    "lora_dropout", "lora_dtype", "lora_ga_config", "lorap_emb_lr", "lorap_lr_ratio",
    "megatron_core", "merge_weights", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "velora_config",
}  # fmt: skip
# Other ways to begin change the base, too.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# Kinds without weights that could be added to a base's, and the keys of such kinds of LoRA.
_NEVER_MERGED = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "XLORA",
}  # fmt: skip
_ROUTED = ("alora_invocation_tokens", "arrow_config")
_ALL_LINEAR = "all-linear"
_ANY_LAYERS = re.compile(r".*?\.[^.]*\.\d+\.")  # where no layers_pattern says what they are called


class Choice(NamedTuple):
    """What a configuration says of a matrix that it adapts."""

    rank: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The keys that count.

    Attributes:
        path: of the file, for messages.
        dropout: rate in training.
        rslora: whether the scale is alpha / sqrt(rank).
        selection: the keys that say what is adapted, as they were read, without defaults; rank and
            alpha are always there.
        base: base_model_name_or_path, which nothing vouches for.
    """

    path: Path
    dropout: float
    rslora: bool
    selection: Mapping[str, Any]
    base: Any

    def choose(
        self, matrices: Sequence[str], *, ends: Sequence[str] = (), usual: Sequence[str] = ()
    ) -> dict[str, Choice]:
        """Return the matrices that are adapted, chosen as PEFT chooses them.

        Args:
            matrices: of all layers, by their full names.
            ends: embedding and head, which "all-linear" leaves out.
            usual: what target_modules means where it is absent.

        Raises:
            CheckpointError: nothing says what is adapted, or an expression cannot be matched.
        """
        targets = self.selection.get("target_modules", list(usual))
        if not targets:
            raise _wrong(self.path, "target_modules", None, "It must say what is adapted.")
        ranks, alphas = (self.selection.get(f"{x}_pattern", {}) for x in ("rank", "alpha"))
        layers = _as_list(self.selection.get("layers_pattern", []))
        whole = [x for x in (targets, self.selection.get("exclude_modules")) if isinstance(x, str)]
        patterns = [
            *((text, Pattern("fullmatch", text)) for text in whole if not _is_all_linear(text)),
            *((text, _ending(text)) for text in (*ranks, *alphas)),
            *((text, _before_layer(text)) for text in layers),
        ]
        names = [*matrices, *ends]
        try:
            found = match_names(patterns, names)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path} cannot be used: {error}.",
                "Its expressions decide which matrices are adapted, and with which rank and alpha.",
                "Correct the expression; target_modules may also be a list of names.",
            ) from error
        if isinstance(targets, str) and _is_all_linear(targets):
            targets = list(matrices)
        chosen = [name for name in names if self._adapts(name, targets, found)]
        rank, alpha = self.selection["r"], self.selection["lora_alpha"]
        return {
            name: Choice(_of_first(ranks, name, found, rank), _of_first(alphas, name, found, alpha))
            for name in chosen
        }

    def scale(self, choice: Choice) -> float:
        """What B (A x) of a matrix is multiplied with."""
        return scale_of(choice.alpha, choice.rank, self.rslora)

    def _adapts(
        self, name: str, targets: str | Sequence[str], found: Mapping[Pattern, set[str]]
    ) -> bool:
        """PEFT's check_target_module_exists."""
        excluded = self.selection.get("exclude_modules", [])
        if _is_named(name, excluded, found):
            return False
        if not _is_named(name, targets, found):
            return False
        wanted = self.selection.get("layers_to_transform")
        if wanted is None or isinstance(targets, str) or name in targets:
            return True
        patterns = _as_list(self.selection.get("layers_pattern", []))
        if not (
            any(name in found[_before_layer(text)] for text in patterns)
            if patterns
            else _ANY_LAYERS.match(name)
        ):
            return False
        layer = next(int(part) for part in name.split(".") if part.isdecimal())
        return layer in _as_list(wanted)


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads the configuration of an adapter.

    Raises:
        CheckpointError: absent, not plain LoRA, or values that make no sense.
    """
    path = folder / CONFIG
    if not path.exists():
        raise _no_adapter(folder)
    raw = read_json(path)
    _refuse_unsupported(folder, raw)
    dropout = raw.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise _wrong(path, "lora_dropout", dropout, "A rate is a number from 0 to 1.")
    given = {key: raw[key] for key in _SELECTION if key in raw and not _is_default(raw[key])}
    selection = {"r": 8, "lora_alpha": 8, **given}
    _check_selection(path, selection)
    return PeftConfig(
        path=path,
        dropout=float(dropout),
        rslora=bool(selection.get("use_rslora")),
        selection=selection,
        base=raw.get("base_model_name_or_path"),
    )


def peft_kind(folder: Path) -> str:
    """The peft_type of a folder with a configuration; "" where there is none."""
    kind = read_json(folder / CONFIG).get("peft_type") if (folder / CONFIG).exists() else None
    return kind if isinstance(kind, str) else ""


def _no_adapter(folder: Path) -> CheckpointError:
    kind = "a model" if (folder / "config.json").exists() else "no adapter"
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    example = f", for example {inside[-1]}" if inside else ""
    prefix = (
        " If it is a P-Tuning v2 prefix, infer.generate and infer.chat take it as --prefix."
        if any((folder / name).exists() for name in WEIGHT_FILES)
        else ""
    )
    return CheckpointError(
        f"{folder} is {kind}: it holds no {CONFIG}.",
        "An adapter is a folder with that file and adapter_model.safetensors.",
        f"Give the folder that train.lora or the peft library wrote{example}.{prefix}",
    )


def _refuse_unsupported(folder: Path, raw: Mapping[str, Any]) -> None:
    known = _HARMLESS.union(_SELECTION)
    found = [f"{key} = {shorten(raw[key])}" for key in raw if key not in known and raw[key]]
    kind = raw.get("peft_type")
    if kind != "LORA":
        found = [f"peft_type = {shorten(kind)}"]
    if raw.get("bias") not in (None, "none"):
        found.append(f"bias = {shorten(raw['bias'])}")
    if raw.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        found.append(f"init_lora_weights = {shorten(raw['init_lora_weights'])}")
    if not found:
        return
    merged = (
        "Merge it into its base with the peft library (merge_and_unload), save that with its "
        "tokenizer and use it as the model, or train a LoRA adapter: python -m train.lora."
    )
    if kind in _NEVER_MERGED or any(raw.get(key) for key in _ROUTED):
        merged = (
            "It cannot be merged into its base. Train a LoRA adapter on its data "
            "(python -m train.lora), or answer with the peft library."
        )
    raise CheckpointError(
        f"The adapter {folder} needs what is not supported: {', '.join(found[:10])}.",
        "Known is plain LoRA without biases; with rsLoRA, rank and alpha patterns.",
        merged,
    )


def _check_selection(path: Path, selection: Mapping[str, Any]) -> None:
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = selection.get(name, [])
        if not all(isinstance(text, str) for text in _as_list(value)):
            raise _wrong(path, name, value, "It must be names, or a regular expression.")
    layers = selection.get("layers_to_transform", [])
    if not all(type(layer) is int for layer in _as_list(layers)):
        raise _wrong(path, "layers_to_transform", layers, "It must be numbers of layers.")
    for key, kind in (("r", "rank"), ("lora_alpha", "alpha")):
        patterns = selection.get(f"{kind}_pattern", {})
        if not isinstance(patterns, dict):
            why = "It is an object: a matrix's name and its value."
            raise _wrong(path, f"{kind}_pattern", patterns, why)
        for name, value in ((key, selection[key]), *patterns.items()):
            if kind == "rank" and (type(value) is not int or value < 1):
                raise _wrong(path, name, value, "A rank is a whole number of 1 or more.")
            if type(value) not in (int, float) or not math.isfinite(value):
                raise _wrong(path, name, value, "alpha is a number.")


def _is_default(value: Any) -> bool:
    return value is None or value is False or value in ([], {}, "")


def _is_all_linear(text: str) -> bool:
    return text.lower() == _ALL_LINEAR


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _ending(text: str) -> Pattern:
    """A key of rank_pattern or alpha_pattern: PEFT's get_pattern_key."""
    return Pattern("match", rf"(.*\.)?({text})$")


def _before_layer(text: str) -> Pattern:
    """An entry of layers_pattern."""
    return Pattern("match", rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.")


def _is_named(name: str, wanted: str | Sequence[str], found: Mapping[Pattern, set[str]]) -> bool:
    """Whether a regular expression matches all of a name, or a list has it or its end."""
    if isinstance(wanted, str):
        return name in found.get(Pattern("fullmatch", wanted), ())
    return name in wanted or any(name.endswith(f".{end}") for end in wanted)


def _of_first(
    patterns: Mapping[str, Any], name: str, found: Mapping[Pattern, set[str]], default: Any
) -> Any:
    """The value of the first pattern that matches."""
    return next((x for text, x in patterns.items() if name in found[_ending(text)]), default)


def _wrong(path: Path, name: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} = {shorten(value)} makes no sense.",
        why,
        "Correct it, or copy the adapter again from where it was trained.",
    )
