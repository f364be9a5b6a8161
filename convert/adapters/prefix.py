"""P-Tuning v2 prefixes as the official repository's training saves them, read for answering.

A folder with the prefix encoder's tensors and nothing else: `transformer.prefix_encoder.` and
`embedding.weight` [P, 2 L K H], with projection also `trans.0` and `trans.2`, two linear layers
with a tanh between them. The encoder is computed once, in float32; what remains are the keys and
values that it gives.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.files.shards import WEIGHT_FILES, open_weights, read_json
from convert.files.tensor import StoredTensor, reading
from convert.layouts.names import FLOATS
from convert.layouts.peft_config import peft_kind
from convert.loading.checkpoint import Checkpoint
from convert.loading.folder import open_folder
from convert.loading.values import cast
from glm2_jax.config import GLMConfig
from glm2_jax.errors import CheckpointError
from glm2_jax.prefix import Prefix, with_prefix

_ENCODER = "transformer.prefix_encoder."
_START = re.compile(r"(?:transformer\.)?(?:prefix_encoder\.)?")
_EMBEDDING = "embedding.weight"
_PROJECTION = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
_SAVED = re.compile(r"checkpoint-\d+")
# The norms square what attention makes of a value and sum over its width, in float32. Where that
# overflows they give 0, so that every logit is 0: finite, and meaningless. Far above any trained
# number (float16 ends at 65504), far below the root of float32's largest.
_LARGEST = 2.0**50

Tensors = Mapping[str, StoredTensor]  # by their names within the encoder


@dataclasses.dataclass(frozen=True)
class FoundPrefix:
    """A prefix and where it came from.

    Attributes:
        k: float32 [L, P, K, H] keys.
        v: float32 [L, P, K, H] values.
        projection: whether the encoder has the two linear layers.
        source: the folder.
        digest: sha256 of the encoder's tensors.
        notes: lines for the user.
    """

    k: np.ndarray
    v: np.ndarray
    projection: bool
    source: str
    digest: str
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """P."""
        return self.k.shape[1]


def open_prefix(
    folder: str | os.PathLike,
    base: str | Path,
    *,
    rope_kind: str | None = None,
    template: str | None = None,
    family: str | None = None,
) -> FoundPrefix:
    """Reads a prefix for a base whose weights need not be loaded yet.

    Args:
        folder: holds `pytorch_model.bin` or safetensors of the prefix encoder; or a single
            `checkpoint-N` that does.
        base: the model's folder.
        rope_kind, template, family: as in `convert.load_checkpoint`.

    Raises:
        CheckpointError: either cannot be opened, or they do not belong together.
    """
    found = open_folder(base, rope_kind=rope_kind, template=template, family=family)
    return load_prefix(folder, found.config)


def load_prefix(folder: str | os.PathLike, config: GLMConfig) -> FoundPrefix:
    """As `open_prefix`, for an architecture."""
    path, tensors, notes = _open(Path(folder))
    _check_shapes(path, tensors, config)
    arrays = {name: _read(path, name, tensor) for name, tensor in tensors.items()}
    # [P, 2 L K H] -> [L, P, K, H], the keys of a layer before its values.
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim
    encoded = _encode(path, arrays)
    _check_size(path, encoded)
    encoded = encoded.reshape(-1, L, 2, K, H).swapaxes(0, 1)
    return FoundPrefix(
        k=np.ascontiguousarray(encoded[:, :, 0]),
        v=np.ascontiguousarray(encoded[:, :, 1]),
        projection=len(arrays) > 1,
        source=str(path),
        digest=_digest(tensors),
        notes=tuple(f"prefix {path}: {note}" for note in notes),
    )


def measure_prefix(folder: str | os.PathLike) -> int:
    """P, its number of tokens, without reading the numbers.

    Raises:
        CheckpointError: it is no prefix.
    """
    path, tensors, _ = _open(Path(folder))
    return _length(path, tensors)


def attach_prefix(checkpoint: Checkpoint, found: FoundPrefix) -> Checkpoint:
    """The checkpoint with a prefix in its params (see `with_prefix`), in their type: another model,
    with a fingerprint of its own.

    Raises:
        CheckpointError: a number is too large for float16.
    """
    dtype = checkpoint.params["final_norm"].dtype
    # As in the reference, which rounds what the encoder gives to the model's type.
    rounded = [cast(x, dtype, f"{found.source}: the prefix") for x in (found.k, found.v)]
    prefix = Prefix(*jax.device_put(rounded, checkpoint.params["final_norm"].sharding))
    both = f"{checkpoint.fingerprint} prefix {found.digest}"
    form = "with projection" if found.projection else "without projection"
    said = f"prefix {found.source}: {found.length} tokens (P-Tuning v2, {form})"
    return dataclasses.replace(
        checkpoint,
        params=with_prefix(checkpoint.params, prefix),
        fingerprint=hashlib.sha256(both.encode()).hexdigest(),
        notes=(*checkpoint.notes, *found.notes, said),
    )


def _open(folder: Path) -> tuple[Path, Tensors, tuple[str, ...]]:
    """The folder that has the weights, the encoder's tensors, of which nothing is read, and what to
    report."""
    with reading(folder):
        path = _find_folder(folder)
        weights = open_weights(path)
        found = _encoder_tensors(path, weights.tensors)
        _check_config(path, found)
    return path, found, weights.notes


def _find_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(
            f"The prefix {folder} is {'a file' if folder.exists() else 'not there'}.",
            "A prefix is a folder, such as the training's checkpoint-3000.",
            "Give the folder that holds its pytorch_model.bin.",
        )
    names = sorted(path.name for path in folder.iterdir())
    if any(name.startswith("adapter_") for name in names):
        kind = peft_kind(folder)
        raise CheckpointError(
            f"{folder} is an adapter of the PEFT library, not a P-Tuning v2 prefix.",
            "It has adapter_config.json or adapter_model; a prefix has pytorch_model.bin.",
            "Give it as --adapter (adapter=...)."
            if kind in ("", "LORA")
            else f"{kind} is not read: train a LoRA adapter on its data (python -m train.lora).",
        )
    if any(name in WEIGHT_FILES for name in names):
        return folder
    saved = [name for name in names if _SAVED.fullmatch(name)]
    if len(saved) == 1:
        return _find_folder(folder / saved[0])
    if saved:
        raise CheckpointError(
            f"{folder} holds several prefixes.",
            f"They are {', '.join(saved[:12])}; the last one need not be the best.",
            f"Name one of them, for example {folder / saved[0]}.",
        )
    raise CheckpointError(
        f"{folder} holds no prefix: there are no weights.",
        f"None of {', '.join(WEIGHT_FILES)} is in it, but {', '.join(names[:12]) or 'nothing'}.",
        "Give the folder that the training saved, such as checkpoint-3000.",
    )


def _encoder_tensors(path: Path, tensors: Tensors) -> Tensors:
    """The encoder's tensors by their own names, and no others."""
    known = (_EMBEDDING, *_PROJECTION)
    short = {name: _START.sub("", name, count=1) for name in tensors}
    found = {short[name]: tensor for name, tensor in tensors.items() if short[name] in known}
    others = [name for name in tensors if short[name] not in known]
    if others and found:
        raise CheckpointError(
            f"{path} holds more than a prefix: {len(others)} other tensors ({_some(others)}).",
            "They would be left out: the model's weights are those of --model.",
            f"Save the tensors {_ENCODER}* into a folder of their own and name that; if the others "
            "are a model, save them, too, into one for --model.",
        )
    if others:
        raise CheckpointError(
            f"{path} is no prefix: it holds {_some(others)}.",
            f"A P-Tuning v2 prefix has {_ENCODER}{_EMBEDDING}.",
            "Give a model as --model, and as --prefix what the training with pre_seq_len saved.",
        )
    if _EMBEDDING not in found:
        raise CheckpointError(
            f"{path} has no {_ENCODER}{_EMBEDDING}.",
            "Every prefix encoder has it; the file is not complete.",
            "Copy the prefix again from where it was trained.",
        )
    missing = [name for name in _PROJECTION if name not in found]
    if 0 < len(missing) < len(_PROJECTION):
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)} of the prefix encoder's projection.",
            "It is there as a whole, or not at all (prefix_projection).",
            "Copy the prefix again from where it was trained.",
        )
    if len(found) < len(tensors):
        raise CheckpointError(
            f"{path} has a tensor of the prefix encoder twice, under two names.",
            f"Its names are {', '.join(sorted(tensors))[:300]}.",
            "Copy the prefix again from where it was trained.",
        )
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(name[:200] for name in names[:2]) + more


def _check_config(path: Path, tensors: Tensors) -> None:
    """Holds the tensors against config.json beside them, where there is one."""
    if not os.path.lexists(path / "config.json"):
        return
    raw = read_json(path / "config.json")
    length, projection = raw.get("pre_seq_len"), raw.get("prefix_projection")
    found = _length(path, tensors)
    if length is not None and length != found:
        raise _disagrees(path, f"pre_seq_len = {length}", f"{found} prefix tokens")
    has = "trans.0.weight" in tensors
    if length is not None and projection is not None and bool(projection) != has:
        form = "a projection" if has else "no projection"
        raise _disagrees(path, f"prefix_projection = {bool(projection)}", form)


def _disagrees(path: Path, said: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"The prefix {path} does not fit its config.json.",
        f"config.json says {said}, the weights hold {found}.",
        "Put the files of one training together, or remove config.json.",
    )


def _length(path: Path, tensors: Tensors) -> int:
    shape = tensors[_EMBEDDING].shape
    if len(shape) != 2 or not all(shape):
        fault = "is empty" if len(shape) == 2 else "is damaged"
        raise CheckpointError(
            f"The prefix {path} {fault}: {_ENCODER}{_EMBEDDING} is {shape}.",
            "It needs two dimensions, and a row for each prefix token.",
            "Copy the prefix again from where it was trained.",
        )
    return shape[0]


def _check_shapes(path: Path, tensors: Tensors, config: GLMConfig) -> None:
    length, D = _length(path, tensors), config.hidden_size
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim
    width = 2 * L * K * H
    model = f"{width} = {L} layers x 2 (key, value) x {K} groups x {H}"
    stored = tensors[_EMBEDDING].shape[1]
    if stored != width:
        layers = stored / (2 * K * H)
        guess = f"; {layers:g} layers of this kind" if layers == int(layers) else ""
        raise CheckpointError(
            f"The prefix {path} was trained for another model.",
            f"Its tokens have {stored} numbers{guess}; the model needs {model}.",
            "Take the model that it was trained on.",
        )
    if length > config.seq_length:
        raise CheckpointError(
            f"The prefix {path} has {length} tokens.",
            f"The model's whole context has {config.seq_length}.",
            "Take the model that it was trained on.",
        )
    shapes: list[tuple[int, ...]] = [(D, width), (D,), (width, D), (width,)]
    expected: dict[str, tuple[int, ...]] = dict(zip(_PROJECTION, shapes, strict=True))
    for name, tensor in tensors.items():
        shape = expected.get(name, tensor.shape)
        if tensor.shape != shape:
            raise CheckpointError(
                f"The prefix {path} was trained for another model.",
                f"Its {name} is {tensor.shape} instead of {shape}.",
                "Take the model that it was trained on.",
            )
        if tensor.dtype.name not in FLOATS:
            raise CheckpointError(
                f"The prefix {path} is damaged: {name} is {tensor.dtype.name}, not a float.",
                "A prefix encoder is not quantized, also where its model is.",
                "Copy the prefix again from where it was trained.",
            )


def _read(path: Path, name: str, tensor: StoredTensor) -> np.ndarray:
    with np.errstate(over="ignore"):  # found below
        array = np.asarray(tensor.read()).astype(np.float32, copy=False)
    _check_finite(path, name, array)
    return array


def _encode(path: Path, arrays: Mapping[str, Any]) -> np.ndarray:
    """float32 [P, 2 L K H]."""
    x = arrays[_EMBEDDING]
    if len(arrays) > 1:
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            x = np.tanh(x @ arrays["trans.0.weight"].T + arrays["trans.0.bias"])
            x = x @ arrays["trans.2.weight"].T + arrays["trans.2.bias"]
        _check_finite(path, "what its projection gives", x)
    return x


def _check_finite(path: Path, name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"The prefix {path} holds NaN or infinity: {name}.",
            "The training that made it went wrong, or the file is damaged.",
            "Take an earlier checkpoint of the training.",
        )


def _check_size(path: Path, array: np.ndarray) -> None:
    largest = float(np.abs(array).max())
    if largest > _LARGEST:
        raise CheckpointError(
            f"The prefix {path} has keys or values of up to {largest:.1g}.",
            f"A model computes nonsense with numbers beyond {_LARGEST:.1g}: float32 overflows.",
            "Take an earlier checkpoint of the training.",
        )


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype.name} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
