"""Writes a GGUF file of llama.cpp's architecture "chatglm": metadata, vocabulary, tensors.

Read in llama.cpp's `src/models/chatglm.cpp`: query_key_value and dense_h_to_4h stay fused, in the
published order of rows; the first half of a head is rotated, in neighboring pairs; vectors are
float32, whatever the matrices are.
"""

import contextlib
import dataclasses
import math
import os
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from convert.files.safetensors_writer import Entry
from convert.layouts.hf_tokenizer import CHAT_TEMPLATES, PREFIX, token_names
from convert.layouts.names import INV_FREQ, has_frequencies
from convert.loading.folder import Folder
from convert.writing.destination import new_destination
from convert.writing.floats import Progress
from convert.writing.pytorch import plan_export
from glm2_jax.choices import GGUF_TYPES
from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.extras import pip_install
from glm2_jax.lora import LoRA
from glm2_jax.text.prompt import stop_ids
from glm2_jax.text.ranks import Ranks
from glm2_jax.text.tokenizer import Tokenizer

# Q8_0 stores 32 numbers of a row as int8 and a float16 scale.
_BLOCK = 32
# Up to half a step of float16 above 65504 is rounded down to it; a scale is a 127th.
_TOO_LARGE = {"F16": 65520.0, "Q8_0": 127 * 65520.0}
# A block of smaller numbers has the scale 0 anyway; without them no reciprocal overflows.
_NOTHING = np.float32(1e-30)


def require_gguf() -> types.ModuleType:
    """Return the package gguf, or raise a UsageError that says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            "Writing GGUF needs the package gguf.",
            str(error),
            f"Install it: {pip_install('gguf')}",
        ) from error
    return gguf


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the file."""

    name: str
    kind: Any  # a `gguf.GGMLQuantizationType`: F32, F16 or Q8_0
    source: Entry  # its shape and its elements in float32, complete rows at a time

    @property
    def nbytes(self) -> int:
        """Size of its elements in the file, in bytes."""
        elements, size = require_gguf().GGML_QUANT_SIZES[self.kind]
        return math.prod(self.source.shape) // elements * size

    def byte_chunks(self) -> Iterator[memoryview]:
        """Yield the bytes of its elements, in order."""
        for chunk in self.source.chunks():
            stored = np.ascontiguousarray(self._encode(chunk))
            yield stored.reshape(-1).view(np.uint8).data

    def _encode(self, values: np.ndarray) -> np.ndarray:
        """Return [n] float32, complete rows, as the file holds them."""
        if self.kind.name == "F32":
            return values
        sizes = np.abs(values)
        if sizes.max() >= _TOO_LARGE[self.kind.name]:
            raise CheckpointError(
                f"{self.source.name} holds {sizes.max():g}, which {self.kind.name} of GGUF cannot "
                "represent.",
                "It would become infinite.",
                "" if self.source.shape[-1] % _BLOCK else "Use --type q8_0: its range is larger.",
            )
        if self.kind.name == "F16":
            return values.astype(np.float16)
        rows = np.where(sizes < _NOTHING, np.float32(0), values)
        rows = rows.reshape(-1, self.source.shape[-1])  # it takes 16 at a time: not too short
        return require_gguf().quants.quantize(rows, self.kind)


def gguf_tensors(source: Folder, kind: str, lora: LoRA | None = None) -> list[Tensor]:
    """Return the tensors of the file, in the order of the source's files; see `export_gguf`.

    Rows that are not a multiple of 32 stay f16.
    """
    if kind not in GGUF_TYPES:
        raise UsageError(f"unknown type {kind!r}.", f"Known: {', '.join(GGUF_TYPES)}.")
    config = source.config
    if not has_frequencies(config):
        raise UsageError(
            f"A {config.family} model cannot be written as GGUF.",
            "llama.cpp's architecture chatglm has the network of ChatGLM2, ChatGLM3 and GLM-4-9B.",
            "Use convert.to_pytorch.",
        )
    if config.logn_scaling:
        raise UsageError(
            "A model with logn_scaling cannot be written as GGUF.",
            "llama.cpp does not scale its queries, so its answers would differ.",
        )
    width = config.num_heads * config.head_dim
    if width != config.hidden_size:
        raise UsageError(
            f"A model whose heads are {width} wide together and whose hidden size is "
            f"{config.hidden_size} cannot be written as GGUF.",
            "llama.cpp expects the two to be equal, as in every published model.",
        )
    gguf = require_gguf()
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.CHATGLM, config.num_layers)
    kinds, tensors = gguf.GGMLQuantizationType, []
    for entry in plan_export(source, "chatglm", "float32", lora, dequantize=True).entries:
        if entry.name == INV_FREQ:
            continue
        name = entry.name.removeprefix("transformer.")
        blocks = kind == "q8_0" and entry.shape[-1] % _BLOCK == 0
        matrix = kinds.Q8_0 if blocks else kinds.F16
        stored = kinds.F32 if len(entry.shape) == 1 else matrix
        tensors.append(Tensor(known.get_name(name, (".weight", ".bias")), stored, entry))
    return tensors


def _add_metadata(writer: Any, source: Folder, kind: str, vocabulary: "Vocabulary") -> None:
    """Give a `gguf.GGUFWriter` everything but the tensors."""
    gguf = require_gguf()
    config, tokenizer = source.config, source.tokenizer
    linear = config.rope_kind == "linear"
    values = {
        "type": gguf.GGUFType.MODEL,
        "name": config.family,
        "file_type": getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}"),
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "vocab_size": config.vocab_size,
        "context_length": config.seq_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.ffn_hidden_size,
        "head_count": config.num_heads,
        "head_count_kv": config.num_kv_heads,
        "layer_norm_rms_eps": config.norm_eps,
        "rope_dimension_count": config.head_dim // 2,
        "rope_freq_base": config.rope_base * (1 if linear else config.rope_ratio),
        "token_list": vocabulary.texts,
        "token_types": vocabulary.types,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        # A prompt begins with two ids, and llama.cpp adds one at most: the text has to hold them.
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": tokenizer.adds_dummy_prefix,
    }
    if vocabulary.merges:
        # Their names of a byte-level vocabulary, and of GLM-4's way to cut a text.
        values |= {"tokenizer_model": "gpt2", "tokenizer_pre": "chatglm-bpe"}
        values["token_merges"] = vocabulary.merges
    else:
        # Their name of SentencePiece's byte-pair encoding.
        values |= {"tokenizer_model": "llama", "tokenizer_pre": "default", "unk_token_id": 0}
        values["token_scores"] = vocabulary.scores
    if linear and config.rope_ratio != 1:
        values["rope_scaling_type"] = gguf.RopeScalingType.LINEAR
        values["rope_scaling_factor"] = config.rope_ratio
    # <|user|> and <|observation|> of ChatGLM3 end an answer, too; there is one key for each.
    ends = zip(("eot_token_id", "eom_token_id"), stop_ids(tokenizer)[1:], strict=False)
    for name, value in (*values.items(), *ends):
        getattr(writer, f"add_{name}")(value)
    template = CHAT_TEMPLATES.get(source.template)
    if template is not None:
        # Some programs recognize templates by a piece of their text and would take this one for
        # that of GLM-4; with the prefix in two pieces they render it, or say that they cannot.
        begin, end = PREFIX[: PREFIX.index("<")], PREFIX[PREFIX.index("<") :]
        writer.add_chat_template(template.replace(PREFIX, f"{begin}' ~ '{end}"))


class Vocabulary(NamedTuple):
    """What the file says of each id, by id."""

    texts: Sequence[str]  # unique
    scores: Sequence[float]  # the larger, the sooner two neighbors become this piece
    types: Sequence[int]  # of `gguf.TokenType`
    merges: Sequence[str] = ()  # of a byte-level vocabulary, which has no scores


def gguf_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Return the pieces, the special tokens after them, and the unused ids up to `size`; llama.cpp
    crashes if two ids have the same text, which is a CheckpointError."""
    merges: list[str] = []
    if tokenizer.byte_level:
        kinds = require_gguf().TokenType
        rows = [(tokenizer.piece(i), 0.0, kinds.NORMAL) for i in range(tokenizer.num_pieces)]
        merges = [
            f"{left} {right}"
            for left, right in Ranks(tokenizer.model_bytes, "tokenizer.model").merges()
        ]
    else:
        rows = _pieces(tokenizer)
    return _named(tokenizer, rows, merges, size)


def _pieces(tokenizer: Tokenizer) -> list[tuple[str, float, int]]:
    """Return text, score and type of every piece of a SentencePiece model."""
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    kinds = require_gguf().TokenType
    tests = {
        kinds.UNKNOWN: model.is_unknown,
        kinds.CONTROL: model.is_control,
        kinds.BYTE: model.is_byte,
        kinds.UNUSED: model.is_unused,
    }

    rows = []
    for i in range(len(model)):
        kind = next((kind for kind, test in tests.items() if test(i)), kinds.NORMAL)
        rows.append((model.id_to_piece(i), model.get_score(i), kind))
    return rows


def _named(
    tokenizer: Tokenizer, rows: list[tuple[str, float, int]], merges: list[str], size: int
) -> Vocabulary:
    """Add the special and unused ids to the tokens of the vocabulary file."""
    kinds = require_gguf().TokenType
    rows += [(f"[PAD{i}]", 0.0, kinds.UNUSED) for i in range(len(rows), size)]
    # Bare `sop` and `eop` would be found inside words: the parts of a word are joined to the text
    # of any entry.
    for i, name in token_names(tokenizer).items():
        rows[i] = (name, 0.0, kinds.USER_DEFINED if tokenizer.is_added(i) else kinds.CONTROL)
    texts, scores, types_ = zip(*rows, strict=True)
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise CheckpointError(
            "The tokenizer cannot be written as GGUF.",
            f"Two of its ids have the text {twice!r}.",
            "Check that tokenizer.model is the published file of the model.",
        )
    return Vocabulary(texts, scores, [int(number) for number in types_], merges)


def export_gguf(
    source: Folder,
    destination: str | Path,
    *,
    kind: str,
    lora: LoRA | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write an opened folder as one GGUF file, chunk by chunk: complete, or not at all.

    Quantized matrices are dequantized; an adapter is added in float32 before anything is rounded.

    Args:
        source: an opened folder.
        destination: the new file; it must not exist.
        kind: "f16" or "q8_0", the type of the matrices.
        lora: an adapter to merge.
        progress: called with the bytes written and to write.

    Raises:
        UsageError: the destination exists, an unknown kind, a model that llama.cpp does not
            compute, or the package gguf is not installed.
        CheckpointError: NaN or infinity, a number too large for the kind, or a vocabulary that
            cannot be written.
        InputError: no space, or the file cannot be written. No output remains.
    """
    tensors = gguf_tensors(source, kind, lora)
    vocabulary = gguf_vocabulary(source.tokenizer, source.config.vocab_size)
    gguf = require_gguf()
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.CHATGLM])
    _add_metadata(writer, source, kind, vocabulary)
    for x in tensors:
        shape, dtype = x.source.shape, x.source.dtype
        writer.add_tensor_info(x.name, shape, dtype, x.nbytes, raw_dtype=x.kind)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    # Of each id the length and the text, the score and the type.
    words = sum(8 + len(text.encode()) + 4 + 4 for text in vocabulary.texts)
    words += sum(8 + len(pair.encode()) for pair in vocabulary.merges)
    with new_destination(destination, needed=total + words, file=True) as path:
        with contextlib.closing(writer):
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        with path.open("ab") as file:  # the package itself would need each tensor in memory
            writer.write_padding(file, file.tell())
            for tensor in tensors:
                for data in tensor.byte_chunks():
                    file.write(data)
                    done += len(data)
                    progress(done, total)
                writer.write_padding(file, tensor.nbytes)
            file.flush()
            os.fsync(file.fileno())
