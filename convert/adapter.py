"""Adapter folders in the form of the PEFT library, read and written.

adapter_model.safetensors and adapter_config.json are what PEFT writes and loads; beside them
glm2_jax_adapter.json tells which base and which prompt template the adapter belongs to.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.core import FrozenDict
from safetensors.numpy import save

from convert.atomic import fsync
from convert.gather import gathered
from convert.local import refuse_url
from convert.names import FLOATS, LISTED
from convert.peft_config import CONFIG, PeftConfig, read_peft_config
from convert.shards import read_json, read_weight_file
from convert.stored import StoredTensor, reading
from convert.writer import write_file
from glm2_jax.config import GLMConfig, shorten
from glm2_jax.errors import CheckpointError, InputError
from glm2_jax.lora import TARGETS, LoRA, adapter_shapes

WEIGHTS = "adapter_model.safetensors"
EXTRAS = "glm2_jax_adapter.json"
_FILES = (WEIGHTS, "adapter_model.bin")
_FORMAT = 1
_AGAIN = "Copy the adapter again from where it was trained, or train it again."

_MODULES = {
    "query_key_value": "self_attention.query_key_value",
    "dense": "self_attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}
_TARGET_OF = {module: target for target, module in _MODULES.items()}
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.)?encoder\.layers\.(0|[1-9]\d{0,5})\."
    r"((?:self_attention|mlp)\.\w+)\.lora_([AB])(?:\.\w+)?\.weight"
)

Pairs = dict[tuple[str, int], dict[str, StoredTensor]]  # target, layer -> {"A": .., "B": ..}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter and what it belongs to.

    Attributes:
        lora: its arrays.
        rslora: whether its scale is alpha / sqrt(rank).
        base: fingerprint of the model it was trained on (see `convert.folder.fingerprint`); None =
            not known, likewise below.
        template: prompt template it was trained with.
        extra: whatever else is to be kept, as JSON values.
        source: the folder that it came from.
        digest: sha256 of its stored arrays.
        notes: what the user should be told, one line each.
    """

    lora: LoRA
    rslora: bool = False
    base: str | None = None
    template: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The matrices that it changes."""
        return tuple(target for target in TARGETS if target in self.lora.layers)

    def rank(self, target: str) -> int:
        """R of a target."""
        return self.lora.layers[target]["a"].shape[1]

    def alpha(self, target: str) -> float:
        """The alpha that gives a target its scale."""
        rank = self.rank(target)
        alpha = round(self.lora.scale[target] * (math.sqrt(rank) if self.rslora else rank), 9)
        return int(alpha) if alpha == int(alpha) else alpha


def save_adapter(folder: str | os.PathLike, adapter: Adapter) -> None:
    """Writes an adapter's files into a folder; each is replaced at once, other files stay.

    Args:
        folder: made if it is not there.
        adapter: `source`, `digest` and `notes` are not written.

    Raises:
        UsageError: a URL.
        CheckpointError: NaN or infinity among its numbers.
        InputError: the folder cannot be written.
    """
    refuse_url(folder)
    folder = Path(folder)
    tensors = {
        f"base_model.model.{name}": array for name, array in _published(adapter.lora).items()
    }
    for name, array in tensors.items():
        _check_finite(name, array)
    weights = save(tensors, metadata={"format": "pt"})
    extras = {
        "format": _FORMAT,
        "base_fingerprint": adapter.base,
        "template": adapter.template,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "extra": dict(adapter.extra),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {WEIGHTS: weights, CONFIG: _json(_peft_config(adapter)), EXTRAS: _json(extras)}
        _replace(folder, files)
        fsync(folder)
    except OSError as error:
        raise InputError(
            f"The adapter cannot be written to {folder}: {error.strerror or error}.",
            fix="Free some space, or check the path and its rights.",
        ) from error


def load_adapter(folder: str | os.PathLike, config: GLMConfig) -> Adapter:
    """Reads an adapter folder, written by `save_adapter` or by PEFT.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors or .bin.
        config: the model that the adapter is for.

    Returns:
        The adapter, its arrays float32 in numpy. Where ranks differ among the layers of a target,
        the smaller ones are filled with zeros; where scales differ, B makes up for it.

    Raises:
        UsageError: a URL.
        CheckpointError: no adapter, a damaged one, an unsupported kind, or tensors that do not fit
            the model.
    """
    refuse_url(folder)
    folder = Path(folder)
    with reading(folder), _not_downloaded():
        if not folder.is_dir():
            raise CheckpointError(
                f"The adapter {folder} is {'a file' if folder.exists() else 'not there'}.",
                fix="Give the folder that holds adapter_config.json.",
            )
        peft = read_peft_config(folder)
        path = _find_weights(folder)
        tensors = read_weight_file(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        extras, notes = _read_extras(folder, digest)
        pairs = _find_pairs(path, tensors, config, peft)
        targets = [target for target in TARGETS if any(target == found for found, _ in pairs)]
        layers, scale = {}, {}
        for target in targets:
            layers[target], scale[target] = _stack(target, pairs, config, peft)
    return Adapter(
        lora=LoRA(layers, FrozenDict(scale), peft.dropout),
        rslora=peft.rslora,
        base=extras.get("base_fingerprint"),
        template=extras.get("template"),
        extra=extras.get("extra", {}),
        source=str(folder),
        digest=digest,
        notes=notes,
    )


def _published(lora: LoRA) -> dict[str, np.ndarray]:
    """Published names -> float32 A [R, columns] and B [rows, R]; the rows of the parts joined."""
    tensors = {}
    for target, weights in lora.layers.items():
        arrays = {part: np.asarray(gathered(x), np.float32) for part, x in weights.items()}
        L, R = arrays["a"].shape[:2]
        for layer in range(L):
            name = _module(target, layer)
            rows = [arrays[part][layer].reshape(-1, R) for part in TARGETS[target].up]
            tensors[f"{name}.lora_A.weight"] = arrays["a"][layer].reshape(R, -1)
            tensors[f"{name}.lora_B.weight"] = np.concatenate(rows)
    return tensors


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    first = adapter.targets[0]
    rank, alpha = adapter.rank(first), adapter.alpha(first)
    ranks = {target: adapter.rank(target) for target in adapter.targets}
    alphas = {target: adapter.alpha(target) for target in adapter.targets}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.lora.dropout,
        "target_modules": list(adapter.targets),
        "rank_pattern": {target: found for target, found in ranks.items() if found != rank},
        "alpha_pattern": {target: found for target, found in alphas.items() if found != alpha},
        "use_rslora": adapter.rslora,
        "use_dora": False,
    }


@contextlib.contextmanager
def _not_downloaded() -> Iterator[None]:
    """Readers of checkpoints say that a damaged file is to be downloaded again; adapters differ."""
    try:
        yield
    except CheckpointError as error:
        if not error.fix.startswith("Download"):
            raise
        raise CheckpointError(error.what, error.why, _AGAIN) from error


def _find_weights(folder: Path) -> Path:
    path = next((folder / name for name in _FILES if os.path.lexists(folder / name)), None)
    if path is None:
        raise CheckpointError(
            f"The adapter {folder} has no weights: {WEIGHTS} is absent.",
            f"{CONFIG} says only what they are for.",
            _AGAIN,
        )
    return path


def _find_pairs(
    path: Path, tensors: Mapping[str, StoredTensor], config: GLMConfig, peft: PeftConfig
) -> Pairs:
    """The A and B of every adapted matrix, checked against the model.

    Raises:
        CheckpointError: all that is missing, unexpected, or of a wrong shape or type.
    """
    pairs: Pairs = {}
    problems = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        target = _TARGET_OF.get(match[2]) if match else None
        if match is None or target is None:
            problems.append(f"unexpected: {name[:200]}")
        elif int(match[1]) >= config.num_layers:
            problems.append(f"unexpected: {name}, the model has {config.num_layers} layers")
        elif match[3] in pairs.setdefault((target, int(match[1])), {}):
            problems.append(f"twice: {name}")
        else:
            pairs[target, int(match[1])][match[3]] = tensor
            problems.extend(_misfits(name, tensor, target, int(match[1]), match[3], config, peft))
    for (target, layer), pair in pairs.items():
        problems.extend(
            f"missing: lora_{x} of {_module(target, layer)}" for x in "AB" if x not in pair
        )
    if not peft.some_layers:
        for target in {target for target, _ in pairs}:
            problems.extend(
                f"missing: {_module(target, layer)}"
                for layer in range(config.num_layers)
                if (target, layer) not in pairs
            )
    if not tensors:
        problems.append("no tensors at all")
    if problems:
        more = [f"... and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        raise CheckpointError(
            f"The adapter {path.parent} does not fit the model: {len(problems)} problems.",
            "\n".join([*problems[:LISTED], *more]),
            f"Take the model that it was trained on. What can be adapted: {', '.join(TARGETS)}.",
        )
    return pairs


def _misfits(
    name: str,
    tensor: StoredTensor,
    target: str,
    layer: int,
    side: str,
    config: GLMConfig,
    peft: PeftConfig,
) -> list[str]:
    rank = peft.rank_of(_module(target, layer))
    shapes = adapter_shapes(config, target, rank)
    columns = math.prod(shapes["a"][1:])
    rows = sum(math.prod(shapes[part][:-1]) for part in TARGETS[target].up)
    expected = (rank, columns) if side == "A" else (rows, rank)
    problems = []
    if tensor.shape != expected:
        problems.append(f"wrong shape: {name} is {tensor.shape} instead of {expected}")
    if tensor.dtype.name not in FLOATS:
        problems.append(f"wrong type: {name} is {tensor.dtype.name}, not a float")
    return problems


def _module(target: str, layer: int) -> str:
    return f"transformer.encoder.layers.{layer}.{_MODULES[target]}"


def _stack(
    target: str, pairs: Pairs, config: GLMConfig, peft: PeftConfig
) -> tuple[dict[str, np.ndarray], float]:
    """The float32 arrays of a target, layers stacked, and their common scale."""
    found = [layer for other, layer in pairs if other == target]
    modules = {layer: _module(target, layer) for layer in found}
    rank = max(peft.rank_of(module) for module in modules.values())
    scales = {layer: peft.scale_of(module) for layer, module in modules.items()}
    scale = max(scales.values(), key=abs)
    shapes = adapter_shapes(config, target, rank)
    arrays = {x: np.zeros((config.num_layers, *shape), np.float32) for x, shape in shapes.items()}
    for layer in found:
        a, b = (_read(pairs[target, layer][side]) for side in "AB")
        for side, array in (("A", a), ("B", b)):
            _check_finite(f"lora_{side} of {modules[layer]}", array)
        if scales[layer] != scale:
            b = b * np.float32(scales[layer] / scale)
        arrays["a"][layer, : len(a)] = a.reshape(len(a), *shapes["a"][1:])
        start = 0
        for part in TARGETS[target].up:
            stop = start + math.prod(shapes[part][:-1])
            arrays[part][layer, ..., : len(a)] = b[start:stop].reshape(*shapes[part][:-1], len(a))
            start = stop
    return arrays, scale


def _read(tensor: StoredTensor) -> np.ndarray:
    return np.asarray(tensor.read()).astype(np.float32)


def _check_finite(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"{name} holds NaN or infinity.",
            "The training that made it went wrong, or the file is damaged.",
            "Take an earlier checkpoint of the training.",
        )


def _read_extras(folder: Path, digest: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the adapter says beside PEFT's files, and what the user should know of that."""
    path = folder / EXTRAS
    unknown = "which base model and template it belongs to is not known"
    if not os.path.lexists(path):
        return {}, (f"the adapter has no {EXTRAS}: {unknown}",)
    extras = read_json(path)
    if extras.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} has the format {shorten(extras.get('format'))}; this version reads {_FORMAT}.",
            fix="Update this project, or remove the file.",
        )
    if extras.get("weights_sha256") != digest:
        raise CheckpointError(
            f"The weights of the adapter {folder} are not those that were written with {EXTRAS}.",
            "They are damaged, or another tool changed them.",
            f"{_AGAIN} Or remove {EXTRAS}: then it is one of PEFT, whose base is not checked.",
        )
    for key in ("base_fingerprint", "template"):
        if not isinstance(extras.get(key), str | None):
            raise CheckpointError(f"{path}: {key} = {shorten(extras[key])} is not a text.")
    if not isinstance(extras.get("extra", {}), dict):
        raise CheckpointError(f"{path}: extra = {shorten(extras['extra'])} is not an object.")
    return extras, ()


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes all files under other names first, so that each is old or new, never half.

    What belongs to the old weights goes before they do: between the two it is one of PEFT.
    """
    for name, data in files.items():
        _new(folder, name).unlink(missing_ok=True)
        write_file(_new(folder, name), data)
    (folder / EXTRAS).unlink(missing_ok=True)
    for name in files:
        _new(folder, name).replace(folder / name)


def _new(folder: Path, name: str) -> Path:
    return folder / f".{name}.new"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
