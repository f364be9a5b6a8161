"""Reads and writes adapter folders in the form of the PEFT library, and attaches adapters.

PEFT writes and loads adapter_model.safetensors and adapter_config.json; glm2_jax_adapter.json adds
the base and the prompt template that the adapter belongs to.
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

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save

from convert.adapters.layouts import LAYOUTS, Layout, Place, layouts_of
from convert.adapters.tensors import (
    Shape,
    check_finite,
    join_tensors,
    on_host,
    split_arrays,
    used_ranks,
)
from convert.files.replace import replace_files
from convert.files.shards import read_json, read_weight_file
from convert.files.tensor import reading
from convert.layouts.peft_config import CONFIG, read_peft_config
from convert.layouts.tokens import TOKENIZER_CONFIG
from convert.loading.checkpoint import Checkpoint
from convert.loading.folder import Folder, fingerprint, open_folder
from glm2_jax.cli.files import refuse_url
from glm2_jax.config import GLMConfig
from glm2_jax.dora import has_magnitudes, with_own_gains
from glm2_jax.errors import CheckpointError, shorten
from glm2_jax.family import FAMILIES, decide_family, named_family, tokenizer_signs
from glm2_jax.lora import TARGETS, LoRA, join_adapters, with_lora
from glm2_jax.sharding import lora_sharding

WEIGHTS = "adapter_model.safetensors"
EXTRAS = "glm2_jax_adapter.json"
_FILES = (WEIGHTS, "adapter_model.bin")
_FORMAT = 1
_AGAIN = "Copy the adapter again from where it was trained, or train it again."


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter and what it belongs to."""

    lora: LoRA
    rslora: bool = False  # whether its scale is alpha / sqrt(rank)
    base: str | None = None  # fingerprint of the model it was trained on; None = not known
    template: str | None = None  # prompt template it was trained with; None = not known
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what else to keep: JSON
    source: str = ""  # the folder that it came from
    digest: str = ""  # sha256 of its stored arrays
    layout: str = "chatglm"  # the names of the matrices in its folder; see `save_adapter`
    official: str = "chatglm"  # the layout of the official folders of its model
    # What its folder consists of, if `lora` was read apart for training: it is written as it was,
    # and only `Shape.effective` turns `lora` into the adapter.
    shape: Shape | None = None
    notes: tuple[str, ...] = ()  # lines for the user

    @property
    def targets(self) -> tuple[str, ...]:
        """The matrices that it adapts."""
        return tuple(target for target in TARGETS if target in self.lora.layers)

    @property
    def dora(self) -> bool:
        """Whether its rows have magnitudes."""
        return has_magnitudes(self.lora)

    def rank(self, target: str) -> int:
        """R of a target."""
        return self.lora.layers[target]["a"].shape[1]


def save_adapter(folder: str | os.PathLike, adapter: Adapter, *, layout: str | None = None) -> None:
    """Write an adapter's files into a folder; each is replaced atomically, other files stay.

    `layout` names the matrices, one of `LAYOUTS`; None = as its shape does, or as published.

    Raises:
        UsageError: a URL.
        CheckpointError: NaN or infinity among its numbers.
        InputError: the folder cannot be written.
    """
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
    config = {
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
    files = {WEIGHTS: weights, CONFIG: _json(config), EXTRAS: _json(extras)}
    replace_files(folder, files, what="adapter", first_removed=EXTRAS)


def load_adapter(folder: str | os.PathLike, config: GLMConfig, *, apart: bool = False) -> Adapter:
    """Read an adapter folder, written by `save_adapter` or by PEFT, of either layout.

    Its arrays are float32 in numpy, see `join_tensors`; `apart` reads it with its shape, to
    continue its training, see `Adapter`. A CheckpointError names what is not an adapter,
    is damaged or not supported, or does not fit the model.
    """
    refuse_url(folder)
    folder = Path(folder)
    with reading(folder), _not_downloaded():
        if not folder.is_dir():
            raise CheckpointError(
                f"The adapter {folder} is {'a file' if folder.exists() else 'not found'}.",
                "An adapter is a folder with a configuration and weights.",
                "Give the folder that holds adapter_config.json.",
            )
        peft, notes = read_peft_config(folder), []
        found = [name for name in _FILES if os.path.lexists(folder / name)]
        if not found:
            raise CheckpointError(
                f"The adapter {folder} has no weights: {WEIGHTS} is missing.",
                f"{CONFIG} only describes them.",
                _AGAIN,
            )
        if found[1:]:
            notes.append(f"the adapter is read from {found[0]}; left out: {', '.join(found[1:])}")
        path = folder / found[0]
        tensors = read_weight_file(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        extras = _read_extras(folder, digest)
        if extras is None:
            named = f"; its {CONFIG} names the base {shorten(peft.base)}" if peft.base else ""
            what = "the base model and template it belongs to are not known"
            notes.append(f"the adapter has no {EXTRAS}: {what}{named}")
        lora, shape = join_tensors(path, tensors, config, peft, apart=apart)
    extras = extras or {}
    return Adapter(
        lora=lora,
        rslora=peft.rslora,
        base=extras.get("base_fingerprint"),
        template=extras.get("template"),
        extra=extras.get("extra", {}),
        source=str(folder),
        digest=digest,
        layout=shape.layout.name,
        official=layouts_of(config)[0].name,
        shape=shape if apart else None,
        notes=tuple(notes),
    )


def open_adapter(
    adapter: str | os.PathLike,
    base: Folder,
    *,
    family: str | None = None,
    force: bool = False,
    apart: bool = False,
) -> Adapter:
    """Read an adapter for an opened base, whose weights need not be loaded yet; `family` is the one
    that the base was opened as, if that was asked for, and `apart` is as in `load_adapter`.

    With `force` it is accepted even if it was trained on another base, or with another template;
    its notes say so. Otherwise that is a CheckpointError.
    """
    found = load_adapter(adapter, base.config, apart=apart)
    other = None if family is not None else _other_family(found, base)
    differences = []
    if other is not None:
        what = f"The adapter {found.source} was trained on a {other} model."
        why = f"{base.path} is opened as {base.config.family}, whose prompts differ."
        fix = f"Use --family {other} (family={other!r}) if the model is a {other} model; otherwise "
        fix += "give the model that the adapter was trained on, or use"
        differences.append((what, why, fix))
    elif found.base not in (None, fingerprint(base)):
        what = f"The adapter {found.source} was trained on another base model than {base.path}."
        why = f"Its base model has the fingerprint {found.base[:16]}, this model "
        fix = "Give the model that it was trained on. If this model has the same weights in "
        fix += "another layout or dtype, use"
        differences.append((what, f"{why}{fingerprint(base)[:16]}.", fix))
    if found.template not in (None, base.template):
        what = f"The adapter {found.source} was trained with another prompt template."
        why = f"Its template is {found.template!r}; the model's is {base.template!r}."
        differences.append((what, why, f"Use --template {found.template}, or"))
    if differences and not force:
        what, why, fix = differences[0]
        raise CheckpointError(what, why, f"{fix} --force-adapter (force_adapter=True).")
    forced = tuple(f"forced: {what} {why}" for what, why, _ in differences)
    return dataclasses.replace(found, notes=(*found.notes, *forced))


def _other_family(found: Adapter, folder: Folder) -> str | None:
    """Return the family of the adapter's base if the folder is opened as another one: the folder
    has the adapter's fingerprint as that family, or PEFT recorded a name of that family, or the
    tokenizer that trainers save with an adapter shows it."""
    if found.base is None:
        source = Path(found.source)
        named = named_family(read_json(source / CONFIG).get("base_model_name_or_path"))
        if named is None and (source / TOKENIZER_CONFIG).exists():
            signs = tokenizer_signs(read_json(source / TOKENIZER_CONFIG))
            if any(folder.config.family not in sign.families for sign in signs):
                named = decide_family(signs, found.source)
        return None if named == folder.config.family else named
    if found.base == fingerprint(folder):
        return None
    for family in FAMILIES:
        with contextlib.suppress(CheckpointError):
            other = open_folder(folder.path, rope_kind=folder.config.rope_kind, family=family)
            if fingerprint(other) == found.base:
                return family
    return None


def attach(checkpoint: Checkpoint, *adapters: Adapter, joined: bool = False) -> Checkpoint:
    """Return the checkpoint with an adapter in its params (see `with_lora`): another model, with
    another fingerprint. On a mesh it is sharded as the weights that it adapts.

    With `joined` there may be several, of which each row uses one (see `join_adapters`); a
    CheckpointError names one of DoRA, which can only be alone.
    """
    if joined and (found := next((one for one in adapters if one.dora), None)):
        raise CheckpointError(
            f"The adapter {found.source} is one of DoRA, which cannot be chosen by request.",
            "It changes the length of rows, so several of them do not share one product.",
            "Merge it into its base (python -m convert.merge_lora), and serve that.",
        )
    lora = join_adapters([one.lora for one in adapters]) if joined else adapters[0].lora
    place = checkpoint.params["final_norm"].sharding

    def put(lora: LoRA) -> LoRA:
        if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
            return jax.device_put(lora, lora_sharding(lora, place.mesh))
        return jax.device_put(lora, place)

    lora = put(with_own_gains(checkpoint.params, put(lora)))
    digests = " ".join([checkpoint.fingerprint, *(one.digest for one in adapters)])
    notes = [*checkpoint.notes]
    for one in adapters:
        names = ", ".join(f"{x} (rank {one.rank(x)})" for x in one.targets)
        line = f"adapter {one.source}: {one.lora.num_params:,} parameters for {names}"
        notes += [line, *one.notes]
    return dataclasses.replace(
        checkpoint,
        params=with_lora(checkpoint.params, lora),
        fingerprint=hashlib.sha256(digests.encode()).hexdigest(),
        notes=tuple(notes),
    )


def stored_tensors(
    adapter: Adapter, layout: str | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors of an adapter's folder by their names in the model, and the keys of its
    configuration that choose them; `layout` as in `save_adapter`."""
    shape, lora = adapter.shape, adapter.lora
    if shape is not None and layout in (None, shape.layout.name):
        targets = {"target_modules": list(shape.layout.usual)} | dict(shape.selection)
        return split_arrays(on_host(lora), shape.layout, shape.ranks), targets
    known = LAYOUTS[layout or adapter.official]
    arrays = on_host(lora if shape is None else shape.effective(lora))
    ranks = used_ranks(arrays, known)
    return split_arrays(arrays, known, ranks), _selection(adapter, known, ranks)


def _selection(
    adapter: Adapter, layout: Layout, ranks: Mapping[Place, np.ndarray]
) -> dict[str, Any]:
    """Return the keys that choose the matrices, with the rank and the alpha of each.

    For PEFT of any version: keys that came later are written only where they are needed.
    """
    num_layers = len(next(iter(adapter.lora.layers.values()))["a"])
    targets, sizes, alphas = [], {}, {}
    for module in dict.fromkeys(module for module, _ in ranks):
        places = [place for place in ranks if place[0] == module]
        in_all = len(places) == num_layers
        targets += [module.name] if in_all else map(layout.full_name, places)
        size = sizes[module.name] = int(ranks[places[0]].sum())
        # The inverse of `glm2_jax.lora.scale_of`.
        scale = adapter.lora.scale[module.target]
        alpha = round(scale * (math.sqrt(size) if adapter.rslora else size), 9)
        alphas[module.name] = int(alpha) if alpha == int(alpha) else alpha
    rank, alpha = next(iter(sizes.values())), next(iter(alphas.values()))
    others = {
        "rank_pattern": {name: found for name, found in sizes.items() if found != rank},
        "alpha_pattern": {name: found for name, found in alphas.items() if found != alpha},
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
    }
    needed = {key: value for key, value in others.items() if value}
    return {"target_modules": targets, "r": rank, "lora_alpha": alpha, **needed}


@contextlib.contextmanager
def _not_downloaded() -> Iterator[None]:
    """Replace the advice of the readers of checkpoints to download a damaged file again."""
    try:
        yield
    except CheckpointError as error:
        if not error.fix.startswith("Download"):
            raise
        raise CheckpointError(error.what, error.why.splitlines(), _AGAIN) from error


def _read_extras(folder: Path, digest: str) -> dict[str, Any] | None:
    """Return what `EXTRAS` says of the adapter whose weights have that sha256; None without it."""
    path = folder / EXTRAS
    if not os.path.lexists(path):
        return None
    extras = read_json(path)
    if extras.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} has the format {shorten(extras.get('format'))}; this version reads {_FORMAT}.",
            "It was written by a newer version of this project.",
            "Update this project, or remove the file.",
        )
    if extras.get("weights_sha256") != digest:
        raise CheckpointError(
            f"The weights of the adapter {folder} do not match the checksum in {EXTRAS}.",
            "They were damaged, or changed by another tool.",
            f"{_AGAIN} Or remove {EXTRAS}: then the base model is not checked.",
        )
    kinds = {"base_fingerprint": str | None, "template": str | None, "extra": dict}
    for key in kinds.keys() & extras.keys():
        if not isinstance(extras[key], kinds[key]):
            raise CheckpointError(
                f"{path}: {key} = {shorten(extras[key])} is damaged.",
                "The file was changed after it was written.",
                _AGAIN,
            )
    return extras


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
