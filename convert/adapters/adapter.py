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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from convert.adapters.layouts import LAYOUTS, Layout, Module
from convert.adapters.tensors import Shape, Written, check_finite, join_tensors, split_lora
from convert.files.safetensors_writer import write_file
from convert.files.shards import read_json, read_weight_file
from convert.files.tensor import reading
from convert.layouts.peft_config import CONFIG, read_peft_config
from glm2_jax.cli.files import fsync, refuse_url
from glm2_jax.config import GLMConfig, shorten
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.lora import TARGETS, LoRA

WEIGHTS = "adapter_model.safetensors"
EXTRAS = "glm2_jax_adapter.json"
_FILES = (WEIGHTS, "adapter_model.bin")
_FORMAT = 1
_AGAIN = "Copy the adapter again from where it was trained, or train it again."


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter and what it belongs to.

    Attributes:
        lora: its arrays.
        rslora: whether its scale is alpha / sqrt(rank).
        base: fingerprint of the model it was trained on (see
            `convert.loading.folder.fingerprint`); None = not known, likewise below.
        template: prompt template it was trained with.
        extra: whatever else is to be kept, as JSON values.
        source: the folder that it came from.
        digest: sha256 of its stored arrays.
        layout: whose matrices its folder names; see `save_adapter`.
        shape: what its folder consists of, where `lora` was read apart for training; it is written
            again as it is, and `lora` is the adapter by `Shape.effective` alone.
        notes: lines for the user.
    """

    lora: LoRA
    rslora: bool = False
    base: str | None = None
    template: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""
    digest: str = ""
    layout: str = "chatglm"
    shape: Shape | None = None
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
        return _alpha(self.lora.scale[target], self.rank(target), self.rslora)


def save_adapter(folder: str | os.PathLike, adapter: Adapter, *, layout: str | None = None) -> None:
    """Writes an adapter's files into a folder; each is replaced at once, other files stay.

    Args:
        folder: made if it is not there.
        adapter: `source`, `digest` and `notes` are not written.
        layout: whose matrices are named: "chatglm", the published ones, or "glm", those of
            `GlmForCausalLM`; see `split_lora`. None = those of its shape, or the published ones.

    Raises:
        UsageError: a URL, an unknown layout.
        CheckpointError: NaN or infinity among its numbers.
        InputError: the folder cannot be written.
    """
    refuse_url(folder)
    if layout not in (None, *LAYOUTS):
        raise UsageError(f"unknown layout {layout!r}.", f"Known: {', '.join(LAYOUTS)}.")
    folder = Path(folder)
    tensors, selection = stored_tensors(adapter, layout)
    tensors = {f"base_model.model.{name}": array for name, array in tensors.items()}
    for name, array in tensors.items():
        check_finite(name, array)
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
        config = _peft_config(adapter, selection)
        _replace(folder, {WEIGHTS: weights, CONFIG: _json(config), EXTRAS: _json(extras)})
        fsync(folder)
    except OSError as error:
        raise InputError(
            f"The adapter cannot be written to {folder}: {error.strerror or error}.",
            fix="Free some space, or check the path and its rights.",
        ) from error


def load_adapter(folder: str | os.PathLike, config: GLMConfig, *, apart: bool = False) -> Adapter:
    """Reads an adapter folder, written by `save_adapter` or by PEFT, of either layout.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors or .bin.
        config: the model that the adapter is for.
        apart: read it with its shape, for training that goes on with it; see `Adapter`.

    Returns:
        The adapter, its arrays float32 in numpy; see `join_tensors`.

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
                "An adapter is a folder: a configuration and weights together.",
                "Give the folder that holds adapter_config.json.",
            )
        peft = read_peft_config(folder)
        path, left_out = _find_weights(folder)
        tensors = read_weight_file(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        extras, notes = _read_extras(folder, digest, peft.base)
        lora, shape = join_tensors(path, tensors, config, peft, apart=apart)
    return Adapter(
        lora=lora,
        rslora=peft.rslora,
        base=extras.get("base_fingerprint"),
        template=extras.get("template"),
        extra=extras.get("extra", {}),
        source=str(folder),
        digest=digest,
        layout=shape.layout.name,
        shape=shape if apart else None,
        notes=(*left_out, *notes),
    )


def stored_tensors(
    adapter: Adapter, layout: str | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of an adapter's folder by their names in the model, and the keys of its
    configuration that choose them; `layout` as in `save_adapter`."""
    lora, shape = adapter.lora, adapter.shape
    if shape is not None:
        if layout in (None, shape.layout.name):
            targets = {"target_modules": list(shape.layout.usual)}
            return shape.tensors(lora), targets | dict(shape.selection)
        lora = shape.effective(lora)
    known = LAYOUTS[layout or "chatglm"]
    tensors, modules = split_lora(lora, known)
    return tensors, _selection(adapter, modules, known)


def _selection(
    adapter: Adapter, modules: Mapping[Module, Written], layout: Layout
) -> dict[str, Any]:
    """Keys that choose `modules`, with the rank and the alpha of each."""
    num_layers = len(next(iter(adapter.lora.layers.values()))["a"])
    targets = []
    for module, (_, layers) in modules.items():
        in_all = len(layers) == num_layers
        targets += [module.name] if in_all else [layout.full_name((module, x)) for x in layers]
    ranks = {module.name: rank for module, (rank, _) in modules.items()}
    alphas = {
        module.name: _alpha(adapter.lora.scale[module.target], rank, adapter.rslora)
        for module, (rank, _) in modules.items()
    }
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    others = {
        "rank_pattern": {name: found for name, found in ranks.items() if found != rank},
        "alpha_pattern": {name: found for name, found in alphas.items() if found != alpha},
        "use_rslora": adapter.rslora,
    }
    said = {key: value for key, value in others.items() if value}
    return {"target_modules": targets, "r": rank, "lora_alpha": alpha, **said}


def _peft_config(adapter: Adapter, selection: Mapping[str, Any]) -> dict[str, Any]:
    """For PEFT of any version: keys that came later are there only where they say something."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "lora_dropout": adapter.lora.dropout,
        **selection,
    }


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """The inverse of `glm2_jax.lora.scale_of`."""
    alpha = round(scale * (math.sqrt(rank) if rslora else rank), 9)
    return int(alpha) if alpha == int(alpha) else alpha


@contextlib.contextmanager
def _not_downloaded() -> Iterator[None]:
    """Readers of checkpoints say that a damaged file is to be downloaded again; adapters differ."""
    try:
        yield
    except CheckpointError as error:
        if not error.fix.startswith("Download"):
            raise
        raise CheckpointError(error.what, error.why.splitlines(), _AGAIN) from error


def _find_weights(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The weights that PEFT takes, too; and a line where there are others."""
    found = [name for name in _FILES if os.path.lexists(folder / name)]
    if not found:
        raise CheckpointError(
            f"The adapter {folder} has no weights: {WEIGHTS} is absent.",
            f"{CONFIG} says only what they are for.",
            _AGAIN,
        )
    line = f"the adapter is read from {found[0]}; left out: {', '.join(found[1:])}"
    return folder / found[0], (line,) if found[1:] else ()


def _read_extras(folder: Path, digest: str, base: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the adapter says beside PEFT's files, and what the user should know of that."""
    path = folder / EXTRAS
    unknown = "which base model and template it belongs to is not known"
    if not os.path.lexists(path):
        named = f"; its {CONFIG} names the base {shorten(base)}" if base else ""
        return {}, (f"the adapter has no {EXTRAS}: {unknown}{named}",)
    extras = read_json(path)
    if extras.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} has the format {shorten(extras.get('format'))}; this version reads {_FORMAT}.",
            "A newer version of this project wrote it.",
            "Update this project, or remove the file.",
        )
    if extras.get("weights_sha256") != digest:
        raise CheckpointError(
            f"The weights of the adapter {folder} are not those that were written with {EXTRAS}.",
            "They are damaged, or another tool changed them.",
            f"{_AGAIN} Or remove {EXTRAS}: then it is one of PEFT, whose base is not checked.",
        )
    for key in ("base_fingerprint", "template"):
        if not isinstance(extras.get(key), str | None):
            raise _damaged(path, key, extras[key], "a text")
    if not isinstance(extras.get("extra", {}), dict):
        raise _damaged(path, "extra", extras["extra"], "an object")
    return extras, ()


def _damaged(path: Path, key: str, value: Any, wanted: str) -> CheckpointError:
    what = f"{path}: {key} = {shorten(value)} is not {wanted}."
    return CheckpointError(what, "It was changed after it had been written.", _AGAIN)


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
