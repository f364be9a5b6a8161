"""Writes our own format: config.json, tokenizer.model, safetensors and manifest.json.

The weights have the names and shapes of our parameters, one tensor a layer ("layers.3.q"), so
that a folder of any size is written and read without ever holding more than a chunk of it.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from convert.adapters.adapter import Adapter
from convert.files.manifest import MANIFEST, FileEntry, Manifest
from convert.files.safetensors_writer import Entry, write_file, write_shards
from convert.files.tensor import reading
from convert.layouts.names import PARTS, SCALE, Match, Part, own_name
from convert.layouts.tokens import TOKENIZER_CONFIG, tokenizer_config
from convert.loading.folder import Folder, check_fit, target_scheme
from convert.loading.values import CHUNK_ELEMENTS, Values, all_finite, cast
from convert.writing.destination import new_checkpoint
from convert.writing.floats import float_chunks
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.quant import QTensor
from glm2_jax.runtime.dtypes import resolve_dtype
from glm2_jax.runtime.gather import gathered
from glm2_jax.schemes import Scheme
from glm2_jax.text.tokenizer import Tokenizer

DEFAULT_SHARD_SIZE = 4 * 10**9

Progress = Callable[[int, int], None]


def save_checkpoint(
    folder: str | Path,
    config: GLMConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    source: str,
    dtype: str | None = None,
    template: str | None = None,
    overwrite: bool = False,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Writes parameters as a folder of our own format: complete, or not at all.

    Where they lie on a mesh, they are gathered tensor by tensor. With several processes all of them
    call this; the first one writes, and the others come back when the folder is there.

    Args:
        folder: the new folder.
        config: the architecture.
        params: nested dictionary of arrays as `glm2_jax.param_shapes(config)` describes it.
        tokenizer: its SentencePiece model and its tokens go into the folder.
        source: where the weights came from, for the manifest.
        dtype: "float32", "bfloat16" or "float16"; None keeps that of `params["embed"]`.
        template: prompt template; None is the family's own.
        overwrite: replace an existing folder of our own format.
        max_shard_size: bytes of one weight file.
        progress: called with the bytes written and to write.

    Returns:
        The manifest; without files where another process has written it.

    Raises:
        UsageError: the folder exists, an unknown dtype, quantized parameters or a list of layers.
        CheckpointError: parameters of a wrong shape, or NaN or infinity among them.
        InputError: no space, or the folder cannot be written. Nothing is left behind.
    """
    _require_plain(params)
    check_fit(config, tokenizer, template or config.default_template, asked=template is not None)
    kind = float_dtype(dtype or np.dtype(params["final_norm"].dtype).name)
    leaves = {part.path: _leaf(params, part, config) for part in PARTS}
    entries = [
        _array_entry(own_name(part.path, layer), leaves[part.path], layer, kind, part.shape(config))
        for part in PARTS
        for layer in (range(config.num_layers) if part.path[0] == "layers" else (None,))
    ]
    manifest = Manifest(
        source=source,
        dtype=kind.name,
        rope_kind=config.rope_kind,
        template=template or config.default_template,
        files={},
    )
    if jax.process_index() > 0:
        for entry in entries:
            for _ in entry.chunks():  # gives the first process what it needs
                pass
    else:
        _write(
            folder, config, tokenizer, entries, manifest,
            overwrite=overwrite, max_shard_size=max_shard_size, progress=progress,
        )  # fmt: skip
    multihost_utils.sync_global_devices(f"saved {folder}")
    return manifest


def convert_folder(
    source: Folder,
    destination: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    quantize_embeddings: bool = False,
    adapter: Adapter | None = None,
    check: Callable[[Path], None] = lambda folder: None,
    overwrite: bool = False,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Writes an opened folder in our own format, chunk by chunk.

    Args:
        source: what `open_folder` gives.
        destination: the new folder.
        dtype: of what is not quantized; None keeps the stored type.
        quantize: as in `convert.load_checkpoint`, and so is `quantize_embeddings`.
        quantize_embeddings: see there.
        adapter: merged in float32, before the cast; not into weights that are written quantized.
        check: called with the complete folder before it gets its name; raises if it must not.
        overwrite: as in `save_checkpoint`, and so are the rest and the errors.
        max_shard_size: bytes of one weight file.
        progress: called with the bytes written and to write.
    """
    kind, scheme = form_of_conversion(source, dtype, quantize, quantize_embeddings)
    origin = str(source.path) if adapter is None else f"{source.path} + {adapter.source}"
    manifest = Manifest(
        source=os.fsencode(origin).decode(errors="replace"),
        dtype=kind.name,
        rope_kind=source.config.rope_kind,
        template=source.template,
        files={},
        quantization=None if scheme is None else scheme.name,
    )
    entries = _stored_entries(source, kind, scheme, adapter)
    return _write(
        destination, source.config, source.tokenizer, entries, manifest,
        source=source.path, check=check, overwrite=overwrite, max_shard_size=max_shard_size,
        progress=progress,
    )  # fmt: skip


def form_of_conversion(
    source: Folder,
    dtype: str | None,
    quantize: str | None = None,
    quantize_embeddings: bool = False,
) -> tuple[np.dtype, Scheme | None]:
    """The types that `convert_folder` would write; it has the same arguments and errors.

    Returns:
        The type of what is not quantized, and how the rest is.
    """
    kind = float_dtype(dtype or source.float_dtype)
    return kind, target_scheme(source, quantize, quantize_embeddings)


def size_of_conversion(
    source: Folder,
    dtype: str | None,
    quantize: str | None = None,
    quantize_embeddings: bool = False,
    adapter: Adapter | None = None,
) -> int:
    """Bytes of weights that `convert_folder` would write; it has the same arguments and errors."""
    kind, scheme = form_of_conversion(source, dtype, quantize, quantize_embeddings)
    return sum(entry.nbytes for entry in _stored_entries(source, kind, scheme, adapter))


def _write(
    destination: str | Path,
    config: GLMConfig,
    tokenizer: Tokenizer,
    entries: list[Entry],
    manifest: Manifest,
    *,
    source: Path | None = None,
    check: Callable[[Path], None] = lambda folder: None,
    overwrite: bool,
    max_shard_size: int,
    progress: Progress,
) -> Manifest:
    needed = sum(entry.nbytes for entry in entries)
    small = small_files(config.to_hf(), tokenizer)
    with new_checkpoint(
        destination, overwrite=overwrite, source=source, needed=needed
    ) as temporary:
        files: dict[str, FileEntry] = {
            **{name: write_file(temporary / name, data) for name, data in small.items()},
            **write_shards(temporary, entries, max_shard_size, progress),
        }
        manifest.files.update(files)
        write_file(temporary / MANIFEST, manifest.to_json().encode())
        check(temporary)
    return manifest


def small_files(config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, bytes]:
    """Everything but the weights: name -> content, of our own format and of official folders.

    Args:
        config: the keys of config.json.
        tokenizer: a tokenizer_config.json is written only where its tokens are not as published.
    """
    ends = list(dict.fromkeys((config["eos_token_id"], *tokenizer.end_ids)))
    config = {**config, "eos_token_id": ends if ends[1:] else ends[0]}
    files = {"config.json": json_file(config), "tokenizer.model": tokenizer.model_bytes}
    tokens = tokenizer_config(tokenizer)
    return files | ({TOKENIZER_CONFIG: json_file(tokens)} if tokens else {})


def json_file(value: Mapping[str, Any]) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def float_dtype(name: str) -> np.dtype:
    """The type to store; nothing of the model needs float64, which becomes float32."""
    return resolve_dtype("float32" if name == "float64" else name, num_params=0)


def _stored_entries(
    source: Folder, dtype: np.dtype, scheme: Scheme | None, adapter: Adapter | None
) -> list[Entry]:
    """What to write, in the order of the source's files, so that disks read forwards."""
    if adapter is not None and scheme is not None:
        raise UsageError(
            f"An adapter cannot be merged into what is written quantized ({scheme.name}).",
            "They would be rounded once more, which can lose what the adapter adds.",
            'Use --dequantize (quantize="none"), or merge into the original weights.',
        )
    lora = None if adapter is None else adapter.lora
    entries = []
    for match in source.matches:
        for part, start, stop in match.rule.ranges(source.config):
            if scheme is not None and part.quantized(scheme):
                entries += _quantized_entries(source, match, part, start, stop, scheme)
            else:
                place = (match, start, stop)
                entries.append(
                    Entry(
                        own_name(part.path, match.layer),
                        part.shape(source.config),
                        dtype,
                        functools.partial(float_chunks, source, part, place, dtype, lora),
                    )
                )
    return entries


def _quantized_entries(
    source: Folder, match: Match, part: Part, start: int, stop: int, scheme: Scheme
) -> Iterator[Entry]:
    """The integers and the scales; both are computed twice rather than held."""

    def chunks(which: int) -> Iterator[np.ndarray]:
        with reading(match.tensor.file):
            values = Values(match, part, start, stop, source.config, source.scheme)
            for rows in values.row_pieces():
                yield values.quantized(rows, scheme)[which]

    name = own_name(part.path, match.layer)
    shapes = scheme.shapes(part.shape(source.config), part.column_axes)
    yield Entry(name, shapes[0], np.dtype(np.int8), functools.partial(chunks, 0))
    yield Entry(name + SCALE, shapes[1], np.dtype(np.float32), functools.partial(chunks, 1))


def _require_plain(params: Mapping[str, Any]) -> None:
    layers = params["layers"]
    if isinstance(layers, Mapping) and not any(isinstance(w, QTensor) for w in layers.values()):
        return
    raise UsageError(
        "Quantized parameters and lists of layers are not written.",
        "The folder holds stacked parameters; `convert_folder` quantizes while it writes.",
        'Load the model with quantize="none" and layers="stacked".',
    )


def _leaf(params: Mapping[str, Any], part: Part, config: GLMConfig) -> Any:
    value: Any = params
    for key in part.path:
        value = value[key]
    stacked = (config.num_layers,) if part.path[0] == "layers" else ()
    if tuple(value.shape) != stacked + part.shape(config):
        raise CheckpointError(
            f"The parameter {'.'.join(part.path)} has the shape {tuple(value.shape)}.",
            f"The configuration says {stacked + part.shape(config)}.",
        )
    return value


def _array_entry(
    name: str, array: Any, layer: int | None, dtype: np.dtype, shape: tuple[int, ...]
) -> Entry:
    """One layer of an array in memory; only that layer comes to the host, and only when it is its
    turn."""

    def chunks() -> Iterator[np.ndarray]:
        flat = gathered(array, layer).reshape(-1)
        for begin in range(0, math.prod(shape), CHUNK_ELEMENTS):
            chunk = flat[begin : begin + CHUNK_ELEMENTS]
            result = cast(chunk, dtype, name)
            if not all_finite(result):
                raise CheckpointError(f"{name} holds NaN or infinity.")
            yield result

    return Entry(name, shape, dtype, chunks)
