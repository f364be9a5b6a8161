"""Tiny official checkpoint folders with random weights, for tests of whatever opens one."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from convert import save_checkpoint
from convert.files.manifest import Manifest
from convert.layouts.names import PUBLISHED, SCALE
from convert.loading.folder import Folder
from convert.writing.own import plan_conversion, write_folder
from glm2_jax import Tokenizer
from glm2_jax.config import GLMConfig
from glm2_jax.parts import parts_of
from glm2_jax.quant import pack_int4
from glm2_jax.schemes import SCHEMES
from tests.support.sp_model import sp_model
from tests.support.torch_zip import write_torch_file

TINY = GLMConfig(
    num_layers=2,
    vocab_size=640,
    hidden_size=32,
    ffn_hidden_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    seq_length=256,
)


def names(folder: Path) -> list[str]:
    """The contents of a folder."""
    return sorted(path.name for path in folder.iterdir())


def edit_json(path: Path, **changes: Any) -> None:
    """Writes other or further keys into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tiny_config(**changes: Any) -> GLMConfig:
    """`TINY` with other values."""
    return dataclasses.replace(TINY, **changes)


def random_params(config: GLMConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters as numpy float32: matrices of unit-scale outputs, norms around 1."""
    random = np.random.default_rng(seed)
    params: dict[str, Any] = {"layers": {}}
    for part in parts_of(config):
        stacked = (config.num_layers,) if part.path[0] == "layers" else ()
        shape = stacked + part.shape(config)
        values = random.standard_normal(shape, dtype=np.float32)
        name = part.path[-1]
        if name.endswith("norm"):
            values = 1 + 0.1 * values
        elif not name.endswith("bias"):
            fan_in = math.prod(shape[2:]) if name == "o" else shape[-1]
            values /= np.float32(math.sqrt(fan_in))
        branch = params["layers"] if stacked else params
        branch[name] = values
    return params


def official_tensors(
    config: GLMConfig, params: dict[str, Any], dtype: str = "float16"
) -> dict[str, np.ndarray]:
    """Our parameters under the published names, fused as published, with the unused inv_freq."""
    frequencies = np.arange(config.head_dim // 4, dtype=np.float32)
    tensors = {"transformer.rotary_pos_emb.inv_freq": frequencies}
    for rule in PUBLISHED:
        for layer in rule.layers(config):
            leaves = [(params | params["layers"])[part.path[-1]] for part in rule.parts]
            parts = [np.asarray(leaf if layer is None else leaf[layer]) for leaf in leaves]
            flat = np.concatenate([part.reshape(-1) for part in parts])
            tensors[rule.full_name(layer)] = flat.reshape(rule.shape(config))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return {name: array.astype(kind) for name, array in tensors.items()}


def write_official(
    folder: Path,
    config: GLMConfig = TINY,
    params: dict[str, Any] | None = None,
    *,
    kind: str = "bin",
    shards: int = 2,
    seed: int = 0,
    dtype: str = "float16",
    raw: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    tokenizer: bytes | None = None,
) -> Path:
    """Writes an official folder of `params`, by default `random_params(config, seed)`.

    With `shards=1` it is a single file without an index. `raw` are other or further keys of
    config.json, None removes one; `tensors` what to store instead, under published names;
    `tokenizer` a SentencePiece model, by default the tiny one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    official = config.to_hf() | {"torch_dtype": dtype} | dict(raw or {})
    official = {key: value for key, value in official.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(official, indent=2))
    (folder / "tokenizer.model").write_bytes(sp_model() if tokenizer is None else tokenizer)
    if tensors is None:
        params = random_params(config, seed) if params is None else params
        tensors = official_tensors(config, params, dtype)
    write_weights(folder, tensors, kind=kind, shards=shards)
    return folder


def quantized_tensors(
    bits: int, config: GLMConfig = TINY, dtype: str = "float16"
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Official names with random int4 or int8 matrices, and the float32 numbers they stand for."""
    tensors, exact = official_tensors(config, random_params(config), dtype), {}
    random = np.random.default_rng(1)
    for rule in PUBLISHED:
        for name in map(rule.full_name, rule.layers(config)):
            exact[name] = tensors[name].astype(np.float32)
            if rule.quantized(SCHEMES["int8"]):
                limit, shape = 2 ** (bits - 1), rule.shape(config)
                q = random.integers(-limit, limit, shape, dtype=np.int8)
                scale = random.uniform(0.001, 0.02, shape[0]).astype(tensors[name].dtype)
                exact[name] = q.astype(np.float32) * scale.astype(np.float32)[:, None]
                tensors[name], tensors[name + SCALE] = pack_int4(q) if bits == 4 else q, scale
    return tensors, exact


def write_quantized(folder: Path, bits: int, config: GLMConfig = TINY, **kwargs: Any) -> Path:
    """Writes an official int4 or int8 folder of `quantized_tensors`, or of other `tensors`."""
    if "tensors" not in kwargs:
        dtype = kwargs.get("dtype", "float16")
        kwargs["tensors"] = quantized_tensors(bits, config, dtype)[0]
    return write_official(folder, config, raw={"quantization_bit": bits}, **kwargs)


def write_weights(
    folder: Path, tensors: Mapping[str, np.ndarray], *, kind: str = "bin", shards: int = 2
) -> None:
    """Writes tensors as one file, or as shards with their index. A layer may be split."""
    stem, suffix = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
    write = write_torch_file if kind == "bin" else lambda path, part: save_file(part, path)
    if shards == 1:
        write(folder / f"{stem}.{suffix}", dict(tensors))
        return
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: tensors[name] for name in names[i * size : (i + 1) * size]}
        write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def save(folder: Path, params: Any = None, config: GLMConfig = TINY, **kwargs: Any):
    """Writes random parameters, or those given, in our own format."""
    params = random_params(config) if params is None else params
    tokenizer = Tokenizer.from_bytes(sp_model(), config.family)
    return save_checkpoint(folder, config, params, tokenizer, source="a test", **kwargs)


def convert_folder(source: Folder, destination: Path, **options: Any) -> Manifest:
    """Writes an opened folder in our own format; options of `plan_conversion`, `write_folder`."""
    keys = {"dtype", "quantize", "quantize_embeddings", "adapter"} & options.keys()
    plan = plan_conversion(source, **{key: options.pop(key) for key in keys})
    write_folder(destination, plan, **options)
    assert plan.manifest is not None
    return plan.manifest
