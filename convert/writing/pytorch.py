"""Writes checkpoint folders for the PyTorch world, from any folder that `open_folder` opens.

"glm" is the HF-native layout, `GlmForCausalLM`, which transformers loads without remote code;
"chatglm" has the names and the configuration of the official repositories.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from convert.files.safetensors_writer import Entry, write_file, write_shards
from convert.files.tensor import reading
from convert.layouts.hf_config import generation_config, native_config
from convert.layouts.hf_tokenizer import tokenizer_files
from convert.layouts.names import GLM, INV_FREQ, PUBLISHED, SCALE, Match, Rule
from convert.loading.folder import OFFICIAL_SCHEMES, Folder
from convert.loading.values import Values
from convert.writing.destination import new_checkpoint
from convert.writing.floats import float_chunks
from convert.writing.own import DEFAULT_SHARD_SIZE, float_dtype, json_file, small_files
from glm2_jax.choices import LAYOUTS
from glm2_jax.config import GLMConfig
from glm2_jax.errors import UsageError
from glm2_jax.lora import LoRA
from glm2_jax.schemes import Scheme
from glm2_jax.text.prompt import stop_ids

# What the official configurations say beside the keys that `GLMConfig` knows.
_OFFICIAL = {
    "apply_query_key_layer_scaling": True,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "use_cache": True,
}

Progress = Callable[[int, int], None]
Places = Mapping[tuple[tuple[str, ...], int | None], tuple[Match, int, int]]


def export_folder(
    source: Folder,
    destination: str | Path,
    *,
    layout: str,
    dtype: str | None = None,
    lora: LoRA | None = None,
    dequantize: bool = False,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes an opened folder in another layout, chunk by chunk: complete, or not at all.

    Quantized matrices stay as they are where `packed_scheme` says so, and are dequantized
    otherwise; an adapter is added in float32 before the cast to `dtype`.

    Args:
        source: what `open_folder` gives.
        destination: the new folder; it must not exist, or be empty.
        layout: one of `LAYOUTS`.
        dtype: "float32", "bfloat16" or "float16"; None keeps the type of the source.
        lora: an adapter to merge.
        dequantize: writes floats in any case.
        max_shard_size: bytes of one weight file.
        progress: called with the bytes written and to write.

    Raises:
        UsageError: the destination exists, an unknown layout or dtype, or a model that the layout
            cannot describe.
        CheckpointError: NaN or infinity, a number too large for float16, or a tokenizer that the
            layout cannot describe.
        InputError: no space, or the folder cannot be written. Nothing is left behind.
    """
    entries = export_entries(source, layout, dtype, lora, dequantize)
    scheme = packed_scheme(source, layout, lora, dequantize)
    files = _small_files(source, layout, float_dtype(dtype or source.float_dtype).name, scheme)
    needed = sum(entry.nbytes for entry in entries) + sum(map(len, files.values()))
    with new_checkpoint(destination, needed=needed, source=source.path) as temporary:
        for name, data in files.items():
            write_file(temporary / name, data)
        write_shards(temporary, entries, max_shard_size, progress, framework="pt")


def packed_scheme(
    source: Folder, layout: str, lora: LoRA | None = None, dequantize: bool = False
) -> Scheme | None:
    """How the matrices of an export are quantized: as in the source, where the official folders
    define the same; None = they are written as floats."""
    same = layout == "chatglm" and source.scheme in OFFICIAL_SCHEMES.values()
    return source.scheme if same and lora is None and not dequantize else None


def export_entries(
    source: Folder,
    layout: str,
    dtype: str | None = None,
    lora: LoRA | None = None,
    dequantize: bool = False,
) -> list[Entry]:
    """The tensors that `export_folder` writes; it has the same arguments and errors.

    They come in the order of the source's files, so that disks read forwards.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}.", f"Known: {', '.join(LAYOUTS)}.")
    kind = float_dtype(dtype or source.float_dtype)
    rules = {"glm": GLM, "chatglm": PUBLISHED}[layout]
    rule_of = {part.path: rule for rule in rules for part in rule.parts}
    places: Places = {
        (part.path, match.layer): (match, start, stop)
        for match in source.matches
        for part, start, stop in match.rule.ranges(source.config)
    }
    wanted = dict.fromkeys((rule_of[path], layer) for path, layer in places)
    scheme = packed_scheme(source, layout, lora, dequantize)
    scale_dtype = kind if scheme is None else _scale_dtype(source, kind)
    entries = []
    for rule, layer in wanted:
        if scheme is not None and rule.quantized(scheme):
            entries += _packed_entries(source, rule, layer, places, scheme, scale_dtype)
        else:
            entries.append(_entry(source, rule, layer, places, kind, lora))
    if layout == "chatglm":
        entries.insert(1, _frequencies(source.config, kind))
    return entries


def _entry(
    source: Folder,
    rule: Rule,
    layer: int | None,
    places: Places,
    dtype: np.dtype,
    lora: LoRA | None,
) -> Entry:
    def chunks() -> Iterator[np.ndarray]:
        for part in rule.parts:
            yield from float_chunks(source, part, places[part.path, layer], dtype, lora)

    return Entry(rule.full_name(layer), rule.shape(source.config), dtype, chunks)


def _packed_entries(
    source: Folder,
    rule: Rule,
    layer: int | None,
    places: Places,
    scheme: Scheme,
    scale_dtype: np.dtype,
) -> Iterator[Entry]:
    """The integers and the scales of an official matrix, as they are stored."""

    def chunks(which: int, dtype: np.dtype) -> Iterator[np.ndarray]:
        for part in rule.parts:
            match, start, stop = places[part.path, layer]
            with reading(match.tensor.file):
                values = Values(match, part, start, stop, source.config, scheme)
                for rows in values.row_pieces():
                    yield values.quantized(rows, scheme)[which].astype(dtype)

    name, integers = rule.full_name(layer), np.dtype(np.int8)
    shapes = scheme.shapes(rule.shape(source.config), rule.column_axes)
    yield Entry(name, shapes[0], integers, functools.partial(chunks, 0, integers))
    yield Entry(name + SCALE, shapes[1], scale_dtype, functools.partial(chunks, 1, scale_dtype))


def _scale_dtype(source: Folder, dtype: np.dtype) -> np.dtype:
    """The type of the other weights if it holds every scale exactly, as in the official folders;
    else float32: another scale would be another model."""
    for match in source.matches:
        if match.scale is None:
            continue
        with reading(match.scale.file), np.errstate(over="ignore"):
            scales = match.scale.read().astype(np.float32)
            if not np.array_equal(scales.astype(dtype).astype(np.float32), scales):
                return np.dtype(np.float32)
    return dtype


def _frequencies(config: GLMConfig, dtype: np.dtype) -> Entry:
    """The buffer that the official files hold and that no code reads: computed anew, step by step
    in the type of the weights, as the published class does."""
    rotated = config.head_dim // 2
    exponents = np.arange(0, rotated, 2).astype(dtype) / dtype.type(rotated)
    frequencies = dtype.type(1) / np.power(dtype.type(config.rope_base), exponents)
    return Entry(INV_FREQ, frequencies.shape, dtype, lambda: iter([frequencies.astype(dtype)]))


def _small_files(
    source: Folder, layout: str, dtype: str, scheme: Scheme | None
) -> dict[str, bytes]:
    """Everything but the weights: name -> content."""
    config, tokenizer = source.config, source.tokenizer
    if layout == "chatglm":
        official = config.to_hf() | _OFFICIAL | {"torch_dtype": dtype}
        if scheme is not None:
            official |= {"quantization_bit": scheme.bits, "quantization_embeddings": False}
        return small_files(official, tokenizer)
    stops = tuple(dict.fromkeys((config.eos_token_id, *stop_ids(tokenizer))))
    return {
        "config.json": json_file(native_config(config, dtype, stops)),
        "generation_config.json": json_file(generation_config(config, stops)),
        **tokenizer_files(tokenizer, source.template, max_length=config.seq_length),
    }
