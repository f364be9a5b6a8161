"""Keeps what was chosen for a model on a device, so that it is measured once.

A file for each device and model, in the user's cache: a choice is worth nothing on another device,
with another version of jax, or for other shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from glm2_jax import GLMConfig
from glm2_jax.attention import ATTENTION
from glm2_jax.choices import REMAT
from glm2_jax.errors import CheckpointError
from glm2_jax.forms import Attention, Forms, Product
from glm2_jax.products import PRODUCTS
from glm2_jax.runtime import native
from glm2_jax.runtime.compile_cache import user_cache
from glm2_jax.runtime.machine import cores, describe_device, vector_units
from infer.memory.precision import Precision
from infer.tuning.choose import Choice
from infer.tuning.kept import VARIABLE
from infer.tuning.measure import Measured, Trained, Tuned

Key = dict[str, Any]


def key_of(config: GLMConfig, precision: Precision, device: Any) -> Key:
    """Return all that a choice depends on: on a CPU also whether it has the native kernel."""
    sizes = "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"
    host = []
    if device.platform == "cpu":
        native.load()
        host = [cores(), vector_units()]
    return {
        "device": describe_device(device),
        "host": host,
        "jax": [jax.__version__, getattr(device.client, "platform_version", "")],
        "forms": sorted([*PRODUCTS, *ATTENTION, *REMAT]),
        "model": {name: getattr(config, name) for name in sizes} | {"mlp": config.block.mlp},
        "weights": [precision.dtype, precision.quantize],
    }


def keep(key: Key, tuned: Tuned, path: Path | None = None) -> Path | None:
    """Write a choice into the user's cache, or to a path; returns where it is, None = nowhere.

    A file appears complete or not at all. In the cache an error of the disk is not one: nothing is
    kept.
    """
    text = json.dumps({"key": key, "tuned": _as_json(tuned)}, indent=1)
    target = path or _path(key)
    if target is None:
        return None
    with contextlib.suppress(OSError) if path is None else contextlib.nullcontext():
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".tuned-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        return target
    return None


def find(key: Key) -> Tuned | None:
    """Return what the user's cache has for a key; None = nothing, or nothing that can be used."""
    path = _path(key)
    with contextlib.suppress(OSError, CheckpointError):
        return read(path, key) if path is not None else None
    return None


def read(path: Path, key: Key) -> Tuned:
    """Read a file. CheckpointError: it is damaged, or of another device or model."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept, tuned = found["key"], _from_json(found["tuned"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} holds no choice of forms.",
            f"It cannot be read ({type(error).__name__}: {error}).",
            "Write it with: python -m infer.tune --output FILE",
        ) from error
    if kept != json.loads(json.dumps(key)):
        names = [name for name in key if not isinstance(kept, dict) or kept.get(name) != key[name]]
        raise CheckpointError(
            f"{path} was measured for another case: {', '.join(names)}.",
            "A choice of forms counts only where it was measured.",
            "Run python -m infer.tune here, or leave --tuned out.",
        )
    return tuned


def _path(key: Key) -> Path | None:
    try:
        folder = user_cache("tuned", VARIABLE)
    except RuntimeError:  # no home folder
        return None
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return None if folder is None else folder / f"{digest[:32]}.json"


def _as_json(tuned: Tuned) -> dict[str, Any]:
    return {
        "products": [[*product, name] for product, name in tuned.forms.products],
        "attention": [[*seen, name] for seen, name in tuned.forms.attention],
        "chunk": tuned.forms.chunk,
        "rows": tuned.rows,
        "layers": tuned.layers,
        "seconds": tuned.seconds,
        "measured": [_line_as_json(line) for line in tuned.measured],
        "training": [
            [one.rows, one.length, _line_as_json(one.attention), _line_as_json(one.remat)]
            for one in tuned.training
        ],
    }


def _line_as_json(line: Measured) -> list[Any]:
    return [line.what, dataclasses.asdict(line.choice)]


def _line_from_json(found: list[Any]) -> Measured:
    what, choice = found
    made = Choice(**choice)
    if made.seconds and not (
        {made.name, made.usual} <= set(made.seconds) and all(x > 0 for x in made.seconds.values())
    ):
        raise ValueError(f"{what} has no times of its forms")
    return Measured(what, made)


def _from_json(found: dict[str, Any]) -> Tuned:
    products = []
    for rows, (R, C), weight, activations, name in found["products"]:
        if name is not None:
            PRODUCTS[name]  # KeyError: not one of ours
        products.append((Product(int(rows), (int(R), int(C)), weight, activations), name))
    attention = []
    for queries, keys, whole, name in found["attention"]:
        if name is not None:
            ATTENTION[name]
        attention.append((Attention(int(queries), int(keys), bool(whole)), name))
    training = []
    for rows, length, *lines in found["training"]:
        one = Trained(int(rows), int(length), *map(_line_from_json, lines))
        if min(one[:2]) < 1:
            raise ValueError(f"training {one.rows} x {one.length} is no shape")
        if not {one.remat.choice.name, *one.remat.choice.seconds} <= set(REMAT):
            raise KeyError(one.remat.choice.name)
        if one.form is not None:
            ATTENTION[one.form]
        training.append(one)
    chunk = found["chunk"]
    return Tuned(
        Forms(tuple(products), tuple(attention), None if chunk is None else int(chunk)),
        tuple(int(rows) for rows in found["rows"]),
        {"list": "list", "stacked": "stacked", None: None}[found["layers"]],
        float(found["seconds"]),
        tuple(map(_line_from_json, found["measured"])),
        tuple(training),
    )
