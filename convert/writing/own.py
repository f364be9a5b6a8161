"""Writes our own format: config.json, tokenizer.model, safetensors and manifest.json.

The weights have the names and shapes of our parameters, one tensor per layer ("layers.3.q"), so
that a folder of any size is written and read in chunks.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from convert.adapters.adapter import Adapter
from convert.files.manifest import MANIFEST, Manifest
from convert.files.safetensors_writer import Entry, write_file, write_shards
from convert.layouts.names import own_name, own_rules
from convert.layouts.tokens import TOKENIZER_CONFIG, tokenizer_config
from convert.loading.folder import Folder, check_fit, target_scheme
from convert.loading.values import CHUNK_ELEMENTS, all_finite, cast
from convert.writing.destination import new_destination
from convert.writing.floats import Plan, Progress, float_dtype, plan_tensors
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.parts import parts_of
from glm2_jax.published import FORMS
from glm2_jax.quant import QTensor
from glm2_jax.runtime.gather import gathered
from glm2_jax.schemes import Scheme
from glm2_jax.text.tokenizer import Tokenizer

DEFAULT_SHARD_SIZE = 4 * 10**9


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
    """Write parameters as a folder of our own format: complete, or not at all.

    Parameters on a mesh are gathered tensor by tensor. With several processes all of them call
    this; the first one writes, and the others return when the folder exists.

    Args:
        folder: the new folder.
        config: the architecture.
        params: nested dictionary of arrays as `glm2_jax.param_shapes(config)` describes it.
        tokenizer: its SentencePiece model and its tokens go into the folder.
        source: where the weights came from, for the manifest.
        dtype: "float32", "bfloat16" or "float16"; None keeps that of `params["final_norm"]`.
        template: prompt template; None is the family's.
        overwrite: replace an existing folder of our own format.
        max_shard_size: bytes of one weight file.
        progress: called with the bytes written and to write.

    Returns:
        The manifest; without files where another process has written it.

    Raises:
        UsageError: the folder exists, an unknown dtype, quantized parameters or a list of layers.
        CheckpointError: parameters of a wrong shape, or NaN or infinity among them.
        InputError: no space, or the folder cannot be written. No output remains.
    """
    used = template or config.default_template
    check_fit(config, tokenizer, used, asked=template is not None)
    kind = float_dtype(dtype or np.dtype(params["final_norm"].dtype).name)
    manifest = Manifest(source, kind.name, config.rope_kind, used, {})
    files = small_files(config.to_hf(), tokenizer)
    plan = Plan(kind, None, list(_array_entries(config, params, kind)), files, manifest)
    if jax.process_index() > 0:
        for entry in plan.entries:
            for _ in entry.chunks():  # gives the first process what it needs
                pass
    else:
        shards = {"max_shard_size": max_shard_size, "progress": progress}
        write_folder(folder, plan, overwrite=overwrite, **shards)
    multihost_utils.sync_global_devices(f"saved {folder}")
    return manifest


def plan_conversion(
    source: Folder,
    dtype: str | None = None,
    quantize: str | None = None,
    quantize_embeddings: bool = False,
    adapter: Adapter | None = None,
) -> Plan:
    """Return what is to be written of an opened folder in our own format.

    `dtype` is the type of what is not quantized, None the stored one; `quantize` and
    `quantize_embeddings` are as in `convert.load_checkpoint`. An adapter is merged in float32,
    before the cast; into weights that are written quantized that is a UsageError.
    """
    scheme = target_scheme(source, quantize, quantize_embeddings)
    if adapter is not None and scheme is not None:
        raise UsageError(
            f"An adapter cannot be merged into weights that are written quantized ({scheme.name}).",
            "They would be rounded once more, which can lose what the adapter adds.",
            'Use --dequantize (quantize="none"), or merge into the original weights.',
        )
    return own_plan(source, dtype, scheme, adapter)


def own_plan(
    source: Folder, dtype: str | None, scheme: Scheme | None, adapter: Adapter | None = None
) -> Plan:
    """Return the plan of `plan_conversion` for a scheme that suits the source."""
    kind, config = float_dtype(dtype or source.float_dtype), source.config
    scales, lora = np.dtype(np.float32), adapter and adapter.lora
    origin = str(source.path) if adapter is None else f"{source.path} + {adapter.source}"
    manifest = Manifest(
        source=os.fsencode(origin).decode(errors="replace"),
        dtype=kind.name,
        rope_kind=config.rope_kind,
        template=source.template,
        files={},
        quantization=scheme and scheme.name,
    )
    entries = plan_tensors(source, own_rules(config), kind, scheme, scales, lora)
    files = small_files(config.to_hf(), source.tokenizer)
    return Plan(kind, scheme, entries, files, manifest, source.path)


def write_folder(
    destination: str | Path,
    plan: Plan,
    *,
    check: Callable[[Path], None] = lambda folder: None,
    overwrite: bool | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the folder of a plan, complete or not at all; errors as of `save_checkpoint`.

    `check` is called with the complete folder before it gets its name; it raises to refuse it.
    """
    needed = plan.nbytes + sum(map(len, plan.files.values()))
    framework = "np" if plan.manifest else "pt"  # transformers refuses others than its own
    place = {"needed": needed, "overwrite": overwrite, "source": plan.source}
    with new_destination(destination, **place) as folder:
        sums = {name: write_file(folder / name, data) for name, data in plan.files.items()}
        sums |= write_shards(folder, plan.entries, max_shard_size, progress, framework=framework)
        if plan.manifest is not None:
            plan.manifest.files.update(sums)
            write_file(folder / MANIFEST, plan.manifest.to_json().encode())
        check(folder)


def small_files(
    config: Mapping[str, Any], tokenizer: Tokenizer, vocabulary: str = "tokenizer.model"
) -> dict[str, bytes]:
    """Return name -> content of all files but the weights, of our own and of official folders.

    `vocabulary` is the name of its file. A tokenizer_config.json is written only where the tokens
    are not as published.
    """
    key, _ = FORMS[config["family"]].fields["eos_token_id"]
    ends = list(dict.fromkeys((config[key], *tokenizer.end_ids)))
    config = {**config, key: ends if ends[1:] else ends[0]}
    files = {"config.json": json_file(config), vocabulary: tokenizer.model_bytes}
    tokens = tokenizer_config(tokenizer)
    return files | ({TOKENIZER_CONFIG: json_file(tokens)} if tokens else {})


def json_file(value: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _array_entries(
    config: GLMConfig, params: Mapping[str, Any], dtype: np.dtype
) -> Iterator[Entry]:
    """Yield a tensor for each layer of each parameter."""
    stacked = params["layers"]
    if not isinstance(stacked, Mapping) or any(isinstance(w, QTensor) for w in stacked.values()):
        raise UsageError(
            "Quantized parameters and lists of layers cannot be written.",
            "The folder holds stacked parameters; convert.from_pytorch quantizes while it writes.",
            'Load the model with quantize="none" and layers="stacked".',
        )
    for part in parts_of(config):
        array: Any = (stacked if part.in_layers else params)[part.name]
        shape = part.shape(config)
        expected = (config.num_layers, *shape) if part.in_layers else shape
        if tuple(array.shape) != expected:
            raise CheckpointError(
                f"The parameter {'.'.join(part.path)} has the shape {tuple(array.shape)}.",
                f"The configuration says {expected}.",
            )
        for layer in range(config.num_layers) if part.in_layers else (None,):
            name = own_name(part.path, layer)
            yield Entry(name, shape, dtype, partial(_array_chunks, array, layer, dtype, name))


def _array_chunks(
    array: Any, layer: int | None, dtype: np.dtype, name: str
) -> Iterator[np.ndarray]:
    """Yield one layer of an array; it comes to the host only when it is its turn."""
    flat = gathered(array, layer).reshape(-1)
    for begin in range(0, flat.size, CHUNK_ELEMENTS):
        result = cast(flat[begin : begin + CHUNK_ELEMENTS], dtype, name)
        if not all_finite(result):
            raise CheckpointError(f"{name} holds NaN or infinity.")
        yield result
