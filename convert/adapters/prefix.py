"""P-Tuning v2 prefixes as the official repository's training saves them, read and written.

A folder holds the tensors of the prefix encoder and no others: `transformer.prefix_encoder.` and
`embedding.weight` [P, 2 L K H], with projection also `trans.0` and `trans.2`, two linear layers
with a tanh between them. To answer, the encoder is computed once, in float32, and its keys and
values remain; training computes it in every step.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.adapters.tensors import check_finite
from convert.files.foreign import RECIPE
from convert.files.replace import replace_files
from convert.files.shards import WEIGHT_FILES, open_weights
from convert.files.tensor import StoredTensor, reading
from convert.files.torch_writer import torch_bytes
from convert.layouts.names import FLOATS, rules_of
from convert.layouts.peft_config import peft_kind
from convert.loading.checkpoint import Checkpoint
from convert.loading.values import cast
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError
from glm2_jax.linear import einsum
from glm2_jax.parts import TABLE
from glm2_jax.prefix import Prefix, with_prefix

_ENCODER = "transformer.prefix_encoder."
_START = re.compile(r"(?:transformer\.)?(?:prefix_encoder\.)?")
_EMBEDDING = "embedding.weight"
# The embedding, and the projection; and their names in training.
_NAMES = (_EMBEDDING, "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
_TRAINED = ("embedding", "down", "down_bias", "up", "up_bias")
# The norms square what attention makes of a value and sum over its width, in float32. Where that
# overflows they give 0, so that every logit is 0: finite, and meaningless. Far above any trained
# number (float16 ends at 65504), far below the root of float32's largest.
_LARGEST = 2.0**50

_COPY_AGAIN = "Copy the prefix again from where it was trained."
_OTHER_MODEL = "Use the model that it was trained on."
_EARLIER = "Use an earlier checkpoint of the training."

Tensors = Mapping[str, StoredTensor]  # by their names within the encoder


@dataclasses.dataclass(frozen=True)
class FoundPrefix:
    """A prefix and where it came from."""

    k: np.ndarray  # float32 [L, P, K, H] keys
    v: np.ndarray  # float32 [L, P, K, H] values
    source: str  # the folder
    digest: str  # sha256 of the encoder's tensors
    notes: tuple[str, ...] = ()  # lines for the user

    @property
    def length(self) -> int:
        """P."""
        return self.k.shape[1]


def load_prefix(folder: str | os.PathLike, config: GLMConfig) -> FoundPrefix:
    """Read a prefix for a model whose weights need not be loaded yet; a CheckpointError says why it
    is not a prefix, damaged, or of another model."""
    path, tensors, notes = _open(folder)
    _check_shapes(path, tensors, config)
    k, v = map(np.ascontiguousarray, _keys_and_values(config, _encode(path, tensors)))
    notes = tuple(f"prefix {path}: {note}" for note in notes)
    return FoundPrefix(k, v, str(path), _digest(tensors), notes)


def init_encoder(
    config: GLMConfig, key: jax.Array, length: int, *, projection: bool = False
) -> dict[str, jax.Array]:
    """Make the encoder of a new prefix of `length` tokens, float32, as torch does: its embedding is
    normal(0, 1), weights and biases of the projection are uniform in +-1 / sqrt(columns)."""
    shapes: dict[str, Any] = dict(
        zip(_TRAINED, _shapes(config, length, projection).values(), strict=False)
    )
    keys = jax.random.split(key, len(shapes))
    found = {"embedding": jax.random.normal(keys[0], shapes.pop("embedding"), jnp.float32)}
    for (name, shape), one in zip(shapes.items(), keys[1:], strict=True):
        bound = 1 / math.sqrt(shapes[name.removesuffix("_bias")][1])
        found[name] = jax.random.uniform(one, shape, jnp.float32, -bound, bound)
    return found


def encode(config: GLMConfig, encoder: Mapping[str, jax.Array], *, dropout: float = 0.0) -> Prefix:
    """Return the prefix that an encoder of `init_encoder` makes; differentiable, jit-able."""
    x = encoder["embedding"]
    if "up" in encoder:
        x = jnp.tanh(einsum("PC,RC->PR", x, encoder["down"]) + encoder["down_bias"])
        x = einsum("PC,RC->PR", x, encoder["up"]) + encoder["up_bias"]
    return Prefix(*_keys_and_values(config, x), dropout=dropout)


def save_prefix(
    folder: str | os.PathLike, config: GLMConfig, encoder: Mapping[str, np.ndarray]
) -> None:
    """Write an encoder of `init_encoder` as the official training does: pytorch_model.bin, and a
    config.json with `pre_seq_len` and `prefix_projection`. Each file is replaced atomically, other
    files stay.

    Raises:
        CheckpointError: NaN or infinity among its numbers.
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
    tensors = {
        f"{_ENCODER}{name}": np.asarray(encoder[trained], np.float32)
        for name, trained in zip(_NAMES, _TRAINED, strict=True) if trained in encoder
    }  # fmt: skip
    for name, array in tensors.items():
        check_finite(name, array)
    settings = {"pre_seq_len": len(encoder["embedding"]), "prefix_projection": "up" in encoder}
    text = json.dumps(config.to_hf() | settings, indent=2, ensure_ascii=False) + "\n"
    files = {"pytorch_model.bin": torch_bytes(tensors), "config.json": text.encode()}
    replace_files(folder, files, what="prefix")


def measure_prefix(folder: str | os.PathLike) -> int:
    """Return P, the number of tokens, without reading the numbers."""
    return _open(folder)[1][_EMBEDDING].shape[0]


def attach_prefix(checkpoint: Checkpoint, found: FoundPrefix) -> Checkpoint:
    """Return the checkpoint with a prefix in its params (see `with_prefix`), in their type: another
    model, with another fingerprint. A CheckpointError names a number too large for float16."""
    dtype = checkpoint.params["final_norm"].dtype
    # As in the reference, which rounds what the encoder gives to the model's type.
    rounded = [cast(x, dtype, f"{found.source}: the prefix") for x in (found.k, found.v)]
    prefix = Prefix(*jax.device_put(rounded, checkpoint.params["final_norm"].sharding))
    both = f"{checkpoint.fingerprint} prefix {found.digest}"
    line = f"prefix {found.source}: {found.length} tokens (P-Tuning v2)"
    return dataclasses.replace(
        checkpoint,
        params=with_prefix(checkpoint.params, prefix),
        fingerprint=hashlib.sha256(both.encode()).hexdigest(),
        notes=(*checkpoint.notes, *found.notes, line),
    )


def _open(folder: str | os.PathLike) -> tuple[Path, Tensors, tuple[str, ...]]:
    """Return the folder, the encoder's tensors, still unread, and notes."""
    path = Path(folder)
    with reading(path):
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        if any(name.startswith("adapter_") for name in names):
            kind = peft_kind(path)
            raise CheckpointError(
                f"{path} is an adapter of the PEFT library, not a P-Tuning v2 prefix.",
                "It has adapter_config.json or adapter_model; a prefix has pytorch_model.bin.",
                "Give it as --adapter (adapter=...)."
                if kind in ("", "LORA")
                else f"{kind} is not supported: train a LoRA adapter on its data "
                "(python -m train.lora).",
            )
        if not any(name in WEIGHT_FILES for name in names):
            missing = "is a file" if path.exists() else "is not found"
            missing = "has no weights" if path.is_dir() else missing
            raise CheckpointError(
                f"The prefix {path} {missing}.",
                f"A prefix is a folder with one of {', '.join(WEIGHT_FILES)}"
                + (f", not {', '.join(names[:12])}." if names else "."),
                "Its training has not finished: run train.prefix again with --resume auto."
                if RECIPE in names
                else "Give the folder that the training saved, such as checkpoint-3000.",
            )
        weights = open_weights(path)
    return path, _encoder_tensors(path, weights.tensors), weights.notes


def _encoder_tensors(path: Path, tensors: Tensors) -> Tensors:
    """Return the encoder's tensors by their names within it; refuse any others."""
    short = {name: _START.sub("", name, count=1) for name in tensors}
    found = {short[name]: tensors[name] for name in tensors if short[name] in _NAMES}
    others = [name[:200] for name in tensors if short[name] not in _NAMES]
    if others:
        more = f" and {len(others) - 2} more" if others[2:] else ""
        listed = f"{', '.join(others[:2])}{more}"
        raise CheckpointError(
            f"{path} holds {'more than a prefix' if found else 'no prefix'}: {listed}.",
            f"A P-Tuning v2 prefix has {_ENCODER}{_EMBEDDING}; other tensors would be ignored, as "
            "the model's weights are those of --model.",
            f"Give a folder with the tensors {_ENCODER}* alone as --prefix; if the others are a "
            "model, give one with them as --model.",
        )
    wanted = _NAMES if len(found) > 1 else _NAMES[:1]
    if len(tensors) != len(wanted) or found.keys() != set(wanted):
        raise CheckpointError(
            f"{path} does not hold one complete prefix encoder.",
            f"Its tensors are {', '.join(sorted(tensors))[:300]}; an encoder has the embedding, "
            "and all of the projection or none of it.",
            _COPY_AGAIN,
        )
    shape = found[_EMBEDDING].shape
    if len(shape) != 2 or not all(shape):
        raise CheckpointError(
            f"The prefix {path} is damaged: {_ENCODER}{_EMBEDDING} is {shape}.",
            "It needs two dimensions, and a row for each prefix token.",
            _COPY_AGAIN,
        )
    return found


def _check_shapes(path: Path, tensors: Tensors, config: GLMConfig) -> None:
    length, width = tensors[_EMBEDDING].shape[0], _width(config)
    if length > config.seq_length:
        raise CheckpointError(
            f"The prefix {path} has {length} tokens.",
            f"The model's context has {config.seq_length}.",
            _OTHER_MODEL,
        )
    for name, shape in _shapes(config, length, len(tensors) > 1).items():
        found, dtype = tensors[name].shape, tensors[name].dtype.name
        if found != shape:
            raise CheckpointError(
                f"The prefix {path} was trained for another model.",
                f"Its {name} is {found} instead of {shape}; {width} = {config.num_layers} layers x "
                f"2 (key, value) x {config.num_kv_heads} groups x {config.head_dim}.",
                _OTHER_MODEL,
            )
        if dtype not in FLOATS:
            raise CheckpointError(
                f"The prefix {path} is damaged: {name} is {dtype}, not a float.",
                "A prefix encoder is not quantized, even if its model is.",
                _COPY_AGAIN,
            )


def _shapes(config: GLMConfig, length: int, projection: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an encoder's tensors."""
    D, width = config.hidden_size, _width(config)
    # The projection of ChatGLM-6B reads a vector of the hidden size, that of ChatGLM2 a full one.
    read = D if config.family == "chatglm" and projection else width
    shapes = ((length, read), (D, read), (D,), (width, D), (width,))
    return dict(zip(_NAMES, shapes if projection else shapes[:1], strict=False))


def _width(config: GLMConfig) -> int:
    """Return 2 L K H, the keys and values of one prefix token."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim


def _keys_and_values(config: GLMConfig, encoded: Any) -> tuple[Any, Any]:
    """Divide [P, 2 L K H] into keys and values [L, P, K, H], a layer's keys before its values."""
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim
    encoded = encoded.reshape(-1, L, 2, K, H).swapaxes(0, 1)
    rule = next(rule for rule in rules_of(config) if TABLE["k"] in rule.parts)
    return encoded[:, :, 0][..., rule.dimensions(H)], encoded[:, :, 1]


def _encode(path: Path, tensors: Tensors) -> np.ndarray:
    """Return the keys and values, float32 [P, 2 L K H], checked."""
    with np.errstate(over="ignore", invalid="ignore"):  # found below
        arrays = {name: np.asarray(x.read()).astype(np.float32) for name, x in tensors.items()}
        x = arrays[_EMBEDDING]
        if len(arrays) > 1:
            x = np.tanh(x @ arrays["trans.0.weight"].T + arrays["trans.0.bias"])
            x = x @ arrays["trans.2.weight"].T + arrays["trans.2.bias"]
    for name, array in (*arrays.items(), ("the result of its projection", x)):
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"The prefix {path} holds NaN or infinity: {name}.",
                "The training diverged, or the file is damaged.",
                _EARLIER,
            )
    largest = float(np.abs(x).max())
    if largest > _LARGEST:
        raise CheckpointError(
            f"The prefix {path} has keys or values of up to {largest:.1g}.",
            f"With numbers beyond {_LARGEST:.1g} float32 overflows, and the logits are wrong.",
            _EARLIER,
        )
    return x


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype.name} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
