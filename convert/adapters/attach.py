"""A checkpoint together with an adapter that was trained on it."""

import contextlib
import dataclasses
import hashlib
import os
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding

from convert.adapters.adapter import Adapter, load_adapter
from convert.files.shards import read_json
from convert.layouts.peft_config import CONFIG
from convert.layouts.tokens import TOKENIZER_CONFIG
from convert.loading.checkpoint import Checkpoint
from convert.loading.folder import Folder, fingerprint, open_folder
from glm2_jax.errors import CheckpointError
from glm2_jax.family import FAMILIES, decide_family, named_family, tokenizer_signs
from glm2_jax.lora import with_lora
from glm2_jax.sharding import lora_sharding


def open_adapter(
    adapter: str | os.PathLike,
    base: str | Path,
    *,
    rope_kind: str | None = None,
    template: str | None = None,
    family: str | None = None,
    force: bool = False,
    apart: bool = False,
) -> Adapter:
    """Read an adapter for a base, the model's folder, whose weights need not be loaded yet.

    `rope_kind`, `template` and `family` are as in `convert.load_checkpoint`, `apart` as in
    `load_adapter`. With `force` it is accepted even if it was trained on another base, or with
    another template; its notes say so. Otherwise that is a CheckpointError.
    """
    folder = open_folder(base, rope_kind=rope_kind, template=template, family=family)
    found = load_adapter(adapter, folder.config, apart=apart)
    other = None if family is not None else _other_family(found, folder, rope_kind)
    differences = []
    if other is not None:
        what = f"The adapter {found.source} was trained on a {other} model."
        why = f"{folder.path} is opened as {folder.config.family}, whose prompts differ."
        fix = f"Use --family {other} (family={other!r}) if the model is a {other} model; otherwise "
        fix += "give the model that the adapter was trained on, or use"
        differences.append((what, why, fix))
    elif found.base not in (None, fingerprint(folder)):
        what = f"The adapter {found.source} was trained on another base model than {folder.path}."
        why = f"Its base model has the fingerprint {found.base[:16]}, this model "
        fix = "Give the model that it was trained on. If this model has the same weights in "
        fix += "another layout or dtype, use"
        differences.append((what, f"{why}{fingerprint(folder)[:16]}.", fix))
    if found.template not in (None, folder.template):
        what = f"The adapter {found.source} was trained with another prompt template."
        why = f"Its template is {found.template!r}; the model's is {folder.template!r}."
        differences.append((what, why, f"Use --template {found.template}, or"))
    if differences and not force:
        what, why, fix = differences[0]
        raise CheckpointError(what, why, f"{fix} --force-adapter (force_adapter=True).")
    forced = tuple(f"forced: {what} {why}" for what, why, _ in differences)
    return dataclasses.replace(found, notes=(*found.notes, *forced))


def _other_family(found: Adapter, folder: Folder, rope_kind: str | None) -> str | None:
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
            other = open_folder(folder.path, rope_kind=rope_kind, family=family)
            if fingerprint(other) == found.base:
                return family
    return None


def attach(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return the checkpoint with an adapter in its params (see `with_lora`): another model, with
    another fingerprint. On a mesh it is sharded as the weights that it adapts."""
    where = checkpoint.params["final_norm"].sharding
    if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
        where = lora_sharding(adapter.lora, where.mesh)
    both = f"{checkpoint.fingerprint} {adapter.digest}"
    names = ", ".join(f"{x} (rank {adapter.rank(x)})" for x in adapter.targets)
    line = f"adapter {adapter.source}: {adapter.lora.num_params:,} parameters for {names}"
    return dataclasses.replace(
        checkpoint,
        params=with_lora(checkpoint.params, jax.device_put(adapter.lora, where)),
        fingerprint=hashlib.sha256(both.encode()).hexdigest(),
        notes=(*checkpoint.notes, line, *adapter.notes),
    )
