"""Reads an adapter_config.json of the PEFT library: what it means here, and what is refused."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convert.files.shards import WEIGHT_FILES, read_json
from glm2_jax.errors import CheckpointError, shorten
from glm2_jax.lora import scale_of

CONFIG = "adapter_config.json"

# What is adapted, and how strongly; false and these values, or a missing key, are the default.
_DEFAULTS = (None, [], {}, "")
_SELECTION = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "r", "lora_alpha",
    "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
)  # fmt: skip
# Keys that change nothing about what a finished adapter computes.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "fan_in_fan_out", "inference_mode", "init_lora_weights", "loftq_config",
    "lora_dropout", "lora_dtype", "lora_ga_config", "lorap_emb_lr", "lorap_lr_ratio",
    "megatron_core", "merge_weights", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "velora_config",
}  # fmt: skip
# Other ways to initialize change the base, too.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_ANY_LAYERS = re.compile(r".*?\.[^.]*\.\d+\.")  # where no layers_pattern says what they are called

_SECONDS = 10.0
_MATCHER = """
import json, re, sys
expressions, names = json.load(sys.stdin)
compiled = [re.compile(text) for text in expressions]
json.dump([[name for name in names if each.fullmatch(name)] for each in compiled], sys.stdout)
"""


class Choice(NamedTuple):
    """What a configuration says of a matrix that it adapts."""

    rank: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The keys that count.

    `selection` has the keys that say what is adapted, as they were read, without defaults; rank and
    alpha are always there.
    """

    path: Path
    dropout: float
    rslora: bool  # whether the scale is alpha / sqrt(rank)
    dora: bool  # whether rows have magnitudes
    selection: Mapping[str, Any]
    base: Any  # base_model_name_or_path, which may be wrong

    def choose(
        self, matrices: Sequence[str], *, ends: Sequence[str] = (), usual: Sequence[str] = ()
    ) -> dict[str, Choice]:
        """Return the matrices that are adapted, chosen as PEFT chooses them.

        `matrices` are those of all layers, by their full names; `ends` embedding and head, which
        "all-linear" leaves out; `usual` is what a missing target_modules means.
        """
        get = self.selection.get
        targets, excluded = get("target_modules", list(usual)), get("exclude_modules", [])
        if not targets:
            raise _wrong(self.path, "target_modules", None, "It must say what is adapted.")
        if isinstance(targets, str) and targets.lower() == "all-linear":
            targets = list(matrices)
        ranks, alphas = (get(f"{kind}_pattern", {}) for kind in ("rank", "alpha"))
        layers = _as_list(get("layers_pattern", []))
        names = [*matrices, *ends]
        found = self._match(
            {
                **{text: text for text in (targets, excluded) if isinstance(text, str)},
                **{_ending(text): text for text in (*ranks, *alphas)},
                **{_before_layer(text): text for text in layers},
            },
            names,
        )

        def is_named(name: str, wanted: str | Sequence[str]) -> bool:
            """An expression matches all of a name; a list has the name or its end."""
            if isinstance(wanted, str):
                return name in found[wanted]
            return name in wanted or any(name.endswith(f".{end}") for end in wanted)

        def adapted(name: str) -> bool:
            """PEFT's check_target_module_exists."""
            if is_named(name, excluded) or not is_named(name, targets):
                return False
            wanted = get("layers_to_transform")
            if wanted is None or isinstance(targets, str) or name in targets:
                return True
            inside = [name in found[_before_layer(text)] for text in layers]
            if not any(inside or [_ANY_LAYERS.match(name)]):
                return False
            layer = next(int(part) for part in name.split(".") if part.isdecimal())
            return layer in _as_list(wanted)

        def first(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
            matched = (patterns[text] for text in patterns if name in found[_ending(text)])
            return next(matched, default)

        return {
            name: Choice(first(ranks, name, get("r")), first(alphas, name, get("lora_alpha")))
            for name in names
            if adapted(name)
        }

    def scale(self, choice: Choice) -> float:
        """Return what B (A x) of a matrix is multiplied with."""
        return scale_of(choice.alpha, choice.rank, self.rslora)

    def _match(self, expressions: Mapping[str, str], names: list[str]) -> dict[str, set[str]]:
        """Return the names that each expression matches; its value is the text in the file.

        They are not trusted, and `re` cannot be interrupted: a separate process can be stopped.
        """
        if not expressions:
            return {}
        some = ", ".join(repr(text[:100]) for text in list(expressions.values())[:3])
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _MATCHER],
                input=json.dumps([list(expressions), names]).encode(),
                capture_output=True,
                timeout=_SECONDS,
            )
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            failure = (lines or [f"exit code {done.returncode}"])[-1] if done.returncode else ""
        except subprocess.TimeoutExpired:
            failure = f"matching {len(names)} names takes more than {_SECONDS:g} s"
        except OSError as error:
            failure = f"no process can be started: {error}"
        if failure:
            raise CheckpointError(
                f"{self.path} cannot be used: {some} cannot be matched: {failure[:200]}.",
                "Its expressions decide which matrices are adapted, and with which rank and alpha.",
                "Correct the expression; target_modules may also be a list of names.",
            )
        return dict(zip(expressions, map(set, json.loads(done.stdout)), strict=True))


def read_peft_config(folder: Path) -> PeftConfig:
    """Read the configuration of an adapter; what is not plain LoRA is a `CheckpointError`."""
    path = folder / CONFIG
    if not path.exists():
        inside = sorted(found.parent for found in folder.glob(f"*/{CONFIG}"))
        weights = any((folder / name).exists() for name in WEIGHT_FILES)
        if not weights and ((folder / "state").is_dir() or (folder / "recipe.yml").exists()):
            raise CheckpointError(
                f"{folder} is the output folder of a training run that has not finished.",
                f"{CONFIG} is missing: it is written at the end.",
                "Run the same training with --resume auto"
                + (f", or give {inside[-1]}." if inside else "."),
            )
        kind = "a model" if (folder / "config.json").exists() else "not an adapter"
        fix = "Give the folder that train.lora or the peft library wrote"
        fix += f", for example {inside[-1]}." if inside else "."
        if weights:
            fix += " If it is a P-Tuning v2 prefix, infer.generate and infer.chat take it as "
            fix += "--prefix."
        raise CheckpointError(
            f"{folder} is {kind}: {CONFIG} is missing.",
            "An adapter is a folder with that file and adapter_model.safetensors.",
            fix,
        )
    raw = read_json(path)
    _refuse_unsupported(folder, raw)
    dropout = raw.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise _wrong(path, "lora_dropout", dropout, "A rate must be at least 0 and less than 1.")
    values = {key: raw.get(key) for key in _SELECTION}
    given = {key: x for key, x in values.items() if x is not False and x not in _DEFAULTS}
    selection = {"r": 8, "lora_alpha": 8, **given}
    _check_selection(path, selection)
    rslora, dora = (bool(selection.get(name)) for name in ("use_rslora", "use_dora"))
    base = raw.get("base_model_name_or_path")
    return PeftConfig(path, float(dropout), rslora, dora, selection, base)


def peft_kind(folder: Path) -> str:
    """Return the peft_type of a folder with a configuration; "" where there is none."""
    kind = read_json(folder / CONFIG).get("peft_type") if (folder / CONFIG).exists() else None
    return kind if isinstance(kind, str) else ""


def _refuse_unsupported(folder: Path, raw: Mapping[str, Any]) -> None:
    known = _HARMLESS.union(_SELECTION)
    bad = [key for key in raw if key not in known and raw[key]]
    if raw.get("peft_type") != "LORA":
        bad = ["peft_type"]
    if raw.get("bias") not in (None, "none"):
        bad.append("bias")
    if raw.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        bad.append("init_lora_weights")
    if bad:
        found = ", ".join(f"{key} = {shorten(raw.get(key))}" for key in bad[:10])
        raise CheckpointError(
            f"The adapter {folder} has settings that are not supported: {found}.",
            "LoRA and DoRA without biases are supported; with rsLoRA, rank and alpha patterns.",
            "Train a LoRA adapter on its data (python -m train.lora); or, where the kind allows "
            "it, merge it into its base with the peft library (merge_and_unload), save that with "
            "its tokenizer and use it as the model.",
        )


def _check_selection(path: Path, selection: Mapping[str, Any]) -> None:
    for name in ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"):
        value, kind = selection.get(name, []), int if name == "layers_to_transform" else str
        if not all(type(item) is kind for item in _as_list(value)):
            why = "numbers of layers" if kind is int else "names, or a regular expression"
            raise _wrong(path, name, value, f"It must be {why}.")
    for key, kind in (("r", "rank"), ("lora_alpha", "alpha")):
        patterns = selection.get(f"{kind}_pattern", {})
        if not isinstance(patterns, dict):
            why = "It must be an object: a matrix's name and its value."
            raise _wrong(path, f"{kind}_pattern", patterns, why)
        for name, value in ((key, selection[key]), *patterns.items()):
            if kind == "rank" and (type(value) is not int or value < 1):
                raise _wrong(path, name, value, "A rank must be an integer of at least 1.")
            if type(value) not in (int, float) or not math.isfinite(value):
                raise _wrong(path, name, value, "alpha must be a finite number.")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _ending(text: str) -> str:
    """Return the expression of a key of rank_pattern or alpha_pattern: PEFT's get_pattern_key."""
    return rf"(.*\.)?({text})"


def _before_layer(text: str) -> str:
    """Return the expression of an entry of layers_pattern, which matches the start of a name."""
    return rf"(?:(?:^|.*?\.){text}\.(?P<idx>\d+)\.).*"


def _wrong(path: Path, name: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} = {shorten(value)} is not valid.",
        why,
        "Correct it, or copy the adapter again from where it was trained.",
    )
