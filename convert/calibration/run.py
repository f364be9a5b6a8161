"""Quantizes a folder layer by layer, and goes on where a killed run stopped.

Finished layers are stored next to the new folder, in `.NAME.quantizing`, until it is complete. A
run that finds them computes their outputs again, and quantizes the first layer that is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.calibration.layer import Batches, Layer, Method, layer_output
from convert.files.safetensors_reader import read_safetensors_file
from convert.files.safetensors_writer import Entry, write_shards
from convert.files.tensor import StoredTensor
from convert.layouts.names import SCALE, own_name
from convert.loading.folder import Folder, fingerprint
from convert.loading.values import Values, cast
from convert.writing.floats import Plan
from convert.writing.own import own_plan
from glm2_jax.cli.files import fsync, real_path, replace_file, writer_lock
from glm2_jax.config import GLMConfig
from glm2_jax.context import token_context
from glm2_jax.errors import InputError, UsageError
from glm2_jax.model import GLM
from glm2_jax.parts import TABLE, parts_of
from glm2_jax.quant import QTensor, dequantize, pack_int4, quantize
from glm2_jax.schemes import COLUMN_AXES, GROUPS, Scheme

_TOKENS = 2048  # of a batch, at most, but for a longer sample
_SETTINGS, _LOCK = "settings.json", "lock"


def check(source: Folder, method: Method, scheme: Scheme) -> None:
    """Raise UsageError for a model that cannot be quantized so."""
    config = source.config
    if source.scheme is not None:
        raise UsageError(
            f"{source.path} is quantized already ({source.scheme.name}).",
            "Quantizing it again would only lose precision.",
            "Start from the original weights.",
        )
    if method.name == "awq" and config.block.normed_residual:
        raise UsageError(
            f"--method awq is not supported for {config.family} models.",
            "Their residual carries the normalized activation, so that a norm cannot be scaled "
            "for the products that read it without changing what is added to them.",
            "Use --method gptq.",
        )
    columns = {name: math.prod(TABLE[name].shape(config)[-n:]) for name, n in COLUMN_AXES.items()}
    for name, count in columns.items():
        if scheme.group(count) != method.form.group:
            fitting = [str(g) for g in GROUPS if all(n % g == 0 for n in columns.values())]
            raise UsageError(
                f"--group {method.form.group} does not divide the {count} columns of {name}.",
                "All groups of a row have the same size.",
                f"Use --group {' or '.join(fitting)}."
                if fitting
                else "Quantize it as it is loaded: --quantize int8.",
            )


def plan_quantization(
    source: Folder,
    destination: str | Path,
    method: Method,
    scheme: Scheme,
    samples: np.ndarray | None,
    dtype: str | None = None,
) -> Plan:
    """Return the plan of a folder whose layers are those that `quantize_layers` finishes.

    `samples` are int32 [samples, T] of token ids, None for the method "rtn"; `dtype` is the type of
    what is not quantized, None the stored one.
    """
    plan, store = own_plan(source, dtype, scheme), work_folder(destination)
    assert plan.manifest is not None
    how = f"{method.name}, {method.form.bits} bits"
    how += "" if samples is None else f", {len(samples)} samples of {samples.shape[1]} tokens"
    manifest = dataclasses.replace(plan.manifest, source=f"{plan.manifest.source} ({how})")

    def stored(entry: Entry) -> Entry:
        if not entry.name.startswith("layers."):
            return entry
        return dataclasses.replace(entry, chunks=partial(_read_back, store, entry.name))

    entries = [stored(entry) for entry in plan.entries]
    return dataclasses.replace(plan, entries=entries, manifest=manifest)


def work_folder(destination: str | Path) -> Path:
    """Return where the finished layers are kept."""
    path = real_path(destination)
    return path.parent / f".{path.name}.quantizing"


@contextlib.contextmanager
def quantized_layers(
    source: Folder,
    destination: str | Path,
    plan: Plan,
    method: Method,
    samples: np.ndarray | None,
    progress: Callable[[int, str], None] = lambda done, more: None,
) -> Iterator[None]:
    """Quantize all layers that are not finished, keep them for the block, and then remove them.

    They stay if anything fails. `progress` is called with the layers done, and the largest error of
    the last one. InputError: another run is at work, or its layers are of other settings.
    """
    store = work_folder(destination)
    store.mkdir(parents=True, exist_ok=True)
    with writer_lock(store / _LOCK, real_path(destination)):
        _settle(store, source, plan, method, samples)
        _quantize(store, source, plan, method, samples, progress)
        yield
        shutil.rmtree(store)


def _settle(
    store: Path, source: Folder, plan: Plan, method: Method, samples: np.ndarray | None
) -> None:
    """Write down what the layers depend on, or compare it with what is written there."""
    tokens = b"" if samples is None else samples.tobytes()
    settings = {
        "model": fingerprint(source), "method": dataclasses.asdict(method),
        "dtype": plan.dtype.name,
        "scheme": plan.scheme and plan.scheme.name, "samples": hashlib.sha256(tokens).hexdigest(),
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))
    path = store / _SETTINGS
    if not path.exists():
        replace_file(path, json.dumps(settings).encode())
        return
    known = json.loads(path.read_text())
    if changed := [name for name in settings if known.get(name) != settings[name]]:
        raise InputError(
            f"{store} holds layers of an unfinished run with another {' and '.join(changed)}.",
            "They cannot be part of this model.",
            "Run that command again to finish it, or remove the folder.",
        )


def _quantize(
    store: Path,
    source: Folder,
    plan: Plan,
    method: Method,
    samples: np.ndarray | None,
    progress: Callable[[int, str], None],
) -> None:
    states = None if samples is None else _States(source, plan.scheme, samples, method)
    for number in range(source.config.num_layers):
        folder, more = _layer_folder(store, number), ""
        weights = _read_layer(source, number, plan.dtype)
        if not folder.exists():
            layer = Layer(source.config, dict(weights), plan.dtype)
            errors = layer.quantize(method, states and states.batches)
            _write_layer(folder, layer, number)
            if errors:
                worst = max(errors, key=lambda name: errors[name])
                more = f"largest error {errors[worst]:.2%} ({worst})"
        if states is not None and number + 1 < source.config.num_layers:
            states.advance(_stored_weights(folder, source.config, number), weights)
        progress(number + 1, more)


class _States:
    """The activations of the samples at one layer, float32 [samples, T, D], in host memory; for
    GPTQ also those of the float model."""

    def __init__(self, source: Folder, scheme: Scheme | None, samples: np.ndarray, method: Method):
        self.config = source.config
        count, length = samples.shape
        most = max(_TOKENS // length, 1)
        rows = max(rows for rows in range(1, most + 1) if count % rows == 0)  # of each batch
        self.samples = samples.reshape(-1, rows, length)
        program = jax.jit(partial(_carry, source.config))

        def embedded(scheme: Scheme | None) -> list[np.ndarray]:
            tables = _tables(source, scheme)
            return [np.asarray(program(tables, tokens)) for tokens in self.samples]

        self.states = embedded(scheme)
        self.floats = embedded(None) if method.name == "gptq" else None

    def batches(self) -> Batches:
        """Yield activations, those of the float model, and tokens."""
        for number, tokens in enumerate(self.samples):
            reference = None if self.floats is None else jnp.asarray(self.floats[number])
            yield jnp.asarray(self.states[number]), reference, jnp.asarray(tokens)

    def advance(self, weights: dict[str, jax.Array], original: dict[str, jax.Array]) -> None:
        """Put the outputs of a layer in place of its inputs."""
        for number, (x, reference, tokens) in enumerate(self.batches()):
            self.states[number] = np.asarray(layer_output(self.config, weights, x, tokens))
            if reference is not None and self.floats is not None:
                found = layer_output(self.config, original, reference, tokens)
                self.floats[number] = np.asarray(found)


def _tables(source: Folder, scheme: Scheme | None) -> dict[str, jax.Array]:
    """Return the tables of which tokens have rows, float32, as the new folder has them."""
    tables = {
        part.name: _floats(source, match, part, start, stop)
        for match in source.matches
        if match.layer is None
        for part, start, stop in match.rule.ranges(source.config)
        if part.name in ("embed", "positions", "blocks")
    }
    if scheme is not None and scheme.covers("embed"):
        scheme = scheme.of("embed")
        integers, scale = map(jnp.asarray, quantize(tables["embed"], scheme))
        tables["embed"] = np.asarray(dequantize(QTensor(integers, scale, scheme.bits), 1))
    return jax.tree.map(jnp.asarray, tables)


def _carry(config: GLMConfig, tables: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Return the embeddings of [B, T] tokens; the other parameters are not used."""
    unused = [part for part in parts_of(config) if not part.in_layers and part.name not in tables]
    params = tables | {part.name: jnp.zeros(part.shape(config)) for part in unused}
    context, _ = token_context(config, tokens, None, None, None, jnp.float32)
    return GLM(config).apply({"params": params}, tokens, context, None, method=GLM.carry)[0]


def _floats(source: Folder, match: Any, part: Any, start: int, stop: int) -> np.ndarray:
    values = Values(match, part, start, stop, source.config, source.scheme)
    chunks = [chunk.astype(np.float32) for chunk in values.chunks()]
    return np.concatenate(chunks).reshape(part.shape(source.config))


def _read_layer(source: Folder, number: int, dtype: np.dtype) -> dict[str, jax.Array]:
    """Return the float32 parameters of a layer; what stays float as `dtype` holds it."""
    weights = {}
    for match in source.matches:
        if match.layer != number:
            continue
        for part, start, stop in match.rule.ranges(source.config):
            array = _floats(source, match, part, start, stop)
            if part.name not in COLUMN_AXES:
                array = cast(array, dtype, match.name).astype(np.float32)
            weights[part.name] = jnp.asarray(array)
    return weights


def _layer_folder(store: Path, number: int) -> Path:
    return store / f"{number:05d}"


def _write_layer(folder: Path, layer: Layer, number: int) -> None:
    """Write a layer, complete or not at all."""
    entries = []

    def add(name: str, array: np.ndarray) -> None:
        entries.append(Entry(name, array.shape, array.dtype, lambda: iter([array])))

    for part in parts_of(layer.config):
        if not part.in_layers:
            continue
        name, shape = own_name(part.path, number), part.shape(layer.config)
        if part.name not in layer.rounded:
            add(name, np.asarray(layer.weights[part.name]).astype(layer.dtype))
            continue
        integers, scale = map(np.asarray, layer.rounded[part.name])
        rows = shape[: -COLUMN_AXES[part.name]]
        add(name, pack_int4(integers).reshape(*shape[:-1], -1))
        add(name + SCALE, scale.reshape(*rows, -1))
    new = folder.with_name("new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    write_shards(new, entries, sum(entry.nbytes for entry in entries))
    new.rename(folder)
    fsync(folder.parent)


def _stored_weights(folder: Path, config: GLMConfig, number: int) -> dict[str, jax.Array]:
    """Return the float32 parameters that a finished layer stands for."""
    tensors = _tensors(folder)
    weights = {}
    for part in parts_of(config):
        if not part.in_layers:
            continue
        name = own_name(part.path, number)
        array = jnp.asarray(tensors[name].read())
        if name + SCALE in tensors:
            scale = jnp.asarray(tensors[name + SCALE].read())
            array = dequantize(QTensor(array, scale, bits=4), scale.ndim - 1)
        weights[part.name] = array.astype(jnp.float32).reshape(part.shape(config))
    return weights


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    return read_safetensors_file(folder / "model.safetensors")


def _read_back(store: Path, name: str) -> Iterator[np.ndarray]:
    number = int(name.split(".")[1])
    yield _tensors(_layer_folder(store, number))[name].read()
