"""Writes one GGUF file for llama.cpp, from any folder that `open_folder` opens."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convert.destination import new_model_file
from convert.folder import Folder
from convert.gguf_layout import (
    Tensor,
    add_metadata,
    gguf_tensors,
    gguf_vocabulary,
    require_gguf,
)
from glm2_jax.lora import LoRA

Progress = Callable[[int, int], None]


def export_gguf(
    source: Folder,
    destination: str | Path,
    *,
    kind: str,
    lora: LoRA | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes an opened folder as one GGUF file, chunk by chunk: complete, or not at all.

    Quantised matrices are dequantised; an adapter is added in float32 before anything is rounded.

    Args:
        source: what `open_folder` gives.
        destination: the new file; it must not exist.
        kind: "f16" or "q8_0", the type of the matrices.
        lora: an adapter to merge.
        progress: called with the bytes written and to write.

    Raises:
        UsageError: the destination exists, an unknown kind, a model that llama.cpp does not
            compute, or the package gguf is not installed.
        CheckpointError: NaN or infinity, a number too large for the kind, or a vocabulary that
            cannot be written.
        InputError: no space, or the file cannot be written. Nothing is left behind.
    """
    tensors = gguf_tensors(source, kind, lora)
    vocabulary = gguf_vocabulary(source.tokenizer, source.config.vocab_size)
    gguf = require_gguf()
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.CHATGLM])
    add_metadata(writer, source, kind, vocabulary)
    for tensor in tensors:
        elements = tensor.source
        writer.add_tensor_info(
            tensor.name, elements.shape, elements.dtype, tensor.nbytes, raw_dtype=tensor.kind
        )
    needed = vocabulary.nbytes + sum(tensor.nbytes for tensor in tensors)
    with new_model_file(destination, needed=needed) as path:
        with contextlib.closing(writer):
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        _append(path, writer, tensors, progress)


def _append(path: Path, writer: Any, tensors: Sequence[Tensor], progress: Progress) -> None:
    """The elements behind the header. The package would want each tensor whole in memory."""
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    with path.open("ab") as file:
        writer.write_padding(file, file.tell())
        for tensor in tensors:
            for data in tensor.byte_chunks():
                file.write(data)
                done += len(data)
                progress(done, total)
            writer.write_padding(file, tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())
