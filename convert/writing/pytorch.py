"""Writes checkpoint folders for the PyTorch world, from any folder that `open_folder` opens.

"glm" is the HF-native layout, `GlmForCausalLM`, which transformers loads without remote code;
"chatglm" has the names and the configuration of the official repositories.
"""

from pathlib import Path

import numpy as np

from convert.files.tensor import reading
from convert.layouts.hf_config import check_native, generation_config, native_config
from convert.layouts.hf_tokenizer import tokenizer_files
from convert.layouts.names import has_frequencies, rules_of
from convert.loading.folder import OFFICIAL_SCHEMES, Folder
from convert.writing.floats import Plan, Progress, float_dtype, plan_tensors
from convert.writing.official import with_computed
from convert.writing.own import DEFAULT_SHARD_SIZE, json_file, small_files, write_folder
from glm2_jax.choices import LAYOUTS
from glm2_jax.errors import UsageError
from glm2_jax.lora import LoRA
from glm2_jax.published import FORMS
from glm2_jax.text.prompt import stop_ids
from glm2_jax.text.tokenizer import SCHEMES

# Keys of the official configurations that `GLMConfig` does not have.
_OFFICIAL = {
    "apply_query_key_layer_scaling": True,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "use_cache": True,
}


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
    """Write an opened folder in another layout, chunk by chunk: complete, or not at all.

    Quantized matrices are written as they are where the official folders have the same form, and
    dequantized elsewhere; an adapter is added in float32 before the cast to `dtype`.

    Args:
        source: an opened folder.
        destination: the new folder; it must not exist, or be empty.
        layout: one of `glm2_jax.choices.LAYOUTS`.
        dtype: "float32", "bfloat16" or "float16"; None keeps the type of the source.
        lora: an adapter to merge.
        dequantize: always write floats.
        max_shard_size: bytes of one weight file.
        progress: called with the bytes written and to write.

    Raises:
        UsageError: the destination exists, an unknown layout or dtype, or a model that the layout
            cannot describe.
        CheckpointError: NaN or infinity, a number too large for float16, or a tokenizer that the
            layout cannot describe.
        InputError: no space, or the folder cannot be written. No output remains.
    """
    plan = plan_export(source, layout, dtype, lora, dequantize)
    write_folder(destination, plan, max_shard_size=max_shard_size, progress=progress)


def plan_export(
    source: Folder,
    layout: str,
    dtype: str | None = None,
    lora: LoRA | None = None,
    dequantize: bool = False,
) -> Plan:
    """Return what `export_folder` writes; it has the same arguments and errors."""
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}.", f"Known: {', '.join(LAYOUTS)}.")
    if layout == "glm":
        check_native(source.config)
    elif FORMS[source.config.family].native:
        raise UsageError(
            f"A {source.config.family} model cannot be written as --layout chatglm.",
            "Its official folders are those of a class of transformers.",
            "Use --layout glm.",
        )
    kind = float_dtype(dtype or source.float_dtype)
    same_form = layout == "chatglm" and source.scheme in OFFICIAL_SCHEMES.values()
    scheme = source.scheme if same_form and lora is None and not dequantize else None
    scale_dtype = kind if scheme is None else _scale_dtype(source, kind)
    rules = rules_of(source.config, native=layout == "glm")
    entries = plan_tensors(source, rules, kind, scheme, scale_dtype, lora)
    config, tokenizer = source.config, source.tokenizer
    if layout == "chatglm":
        official = config.to_hf() | {"torch_dtype": kind.name}
        entries = with_computed(config, entries, kind)
        if has_frequencies(config):
            official |= _OFFICIAL
        if scheme is not None:
            official |= {"quantization_bit": scheme.bits, "quantization_embeddings": False}
        files = small_files(official, tokenizer, SCHEMES[tokenizer.family].file)
    else:
        stops = tuple(dict.fromkeys((config.eos_token_id, *stop_ids(tokenizer))))
        files = {
            "config.json": json_file(native_config(config, kind.name, stops)),
            "generation_config.json": json_file(generation_config(config, stops)),
            **tokenizer_files(tokenizer, source.template, max_length=config.seq_length),
        }
    return Plan(kind, scheme, entries, files, source=source.path)


def _scale_dtype(source: Folder, dtype: np.dtype) -> np.dtype:
    """Return the type of the other weights if it holds every scale exactly, as in the official
    folders; else float32, because another scale would be another model."""
    for match in source.matches:
        if match.scale is None:
            continue
        with reading(match.scale.file), np.errstate(over="ignore"):
            scales = match.scale.read().astype(np.float32)
            if not np.array_equal(scales.astype(dtype).astype(np.float32), scales):
                return np.dtype(np.float32)
    return dtype
