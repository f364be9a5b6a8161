"""Loads a folder: it becomes parameters on a device, one tensor at a time.

Peak memory beyond the parameters themselves is a few chunks of a few megabytes; mapped pages of the
files do not count. With a mesh each process reads only what its devices hold, once; except that
quantizing needs complete rows, because a scale is that of a complete row or group.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from convert.loading.folder import Folder, fingerprint, open_folder, target_scheme
from convert.loading.params import Progress, load_params
from glm2_jax.choices import LAYER_LAYOUTS
from glm2_jax.config import GLMConfig
from glm2_jax.errors import UsageError
from glm2_jax.runtime.devices import find_device
from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype
from glm2_jax.schemes import Scheme
from glm2_jax.sharding import check_mesh
from glm2_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class CheckpointSummary:
    """What was found and what became of it.

    Attributes:
        layout: "own", "official" or "HF-native glm", and how its matrices are stored quantized:
            "official int4", "own int8", "HF-native glm AWQ", ...
        family: one of `choices.FAMILIES`.
        stored_dtype: type of most of the stored weights.
        dtype: type of the parameters in memory, and of the activations.
        quantization: scheme of the matrices in memory (see `glm2_jax.schemes`), or None.
        num_params: number of parameters.
        bytes_on_disk: size of the weight files.
        source: the folder, as given.
    """

    layout: str
    family: str
    stored_dtype: str
    dtype: str
    quantization: str | None
    num_params: int
    bytes_on_disk: int
    source: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened model.

    Attributes:
        config: its architecture.
        params: nested dictionary of arrays, layers stacked (see `glm2_jax`).
        tokenizer: its tokenizer.
        template: its prompt template.
        fingerprint: identifies the base, see `convert.loading.folder.fingerprint`.
        summary: what was found.
        notes: lines for the user.
    """

    config: GLMConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    template: str
    fingerprint: str
    summary: CheckpointSummary
    notes: tuple[str, ...] = ()


def load_checkpoint(
    path: str | Path,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    quantize_embeddings: bool = False,
    layers: str = "stacked",
    mesh: Any = None,
    rope_kind: str | None = None,
    template: str | None = None,
    family: str | None = None,
    device: Any = None,
    progress: Progress = lambda done, total: None,
) -> Checkpoint:
    """Open a checkpoint folder: official (`.bin`, safetensors, int4, int8), HF-native, with the
    matrices of AWQ or GPTQ, or our own.

    Every number that is read is checked for NaN and infinity.

    Args:
        path: the folder.
        dtype: "auto" or the name of a type, e.g. "bfloat16".
        quantize: "int8" or "int4" to quantize the matrices of the layers while loading; None =
            as the folder has them; "none" = dequantize what is stored quantized.
        quantize_embeddings: quantize embedding and head, too, in the same way.
        layers: "stacked" for arrays with a leading axis of layers, "list" for a list of layers.
            Only one of them is ever in memory.
        mesh: a `jax.sharding.Mesh` to spread the parameters over; None = one device.
        rope_kind, template, family: what the folder does not say, see `open_folder`.
        device: a `jax.Device`, the name of a platform, or None for the default; not with a mesh.
        progress: called with the bytes of parameters done and to do in this process.

    Raises:
        UsageError: an impossible argument, or a mesh that does not fit the model.
        CheckpointError: the folder cannot be opened; the message says which file and why.
        DeviceError: no such device.
    """
    if layers not in LAYER_LAYOUTS:
        raise UsageError(f"layers={layers!r} is unknown.", f"Known: {', '.join(LAYER_LAYOUTS)}.")
    device = _one_device(mesh, device)
    folder = open_folder(path, rope_kind=rope_kind, template=template, family=family)
    config, scheme = folder.config, target_scheme(folder, quantize, quantize_embeddings)
    if mesh is not None:
        check_mesh(config, mesh, scheme)
    target = resolve_dtype(dtype, num_params=config.num_params, device=device)
    where = device if mesh is None else mesh
    params = load_params(folder, target, scheme, layers == "list", where, progress)
    name = dtype_name(target)
    summary = CheckpointSummary(
        layout=folder.layout,
        family=config.family,
        stored_dtype=folder.stored_dtype,
        dtype=name,
        quantization=None if scheme is None else scheme.name,
        num_params=config.num_params,
        bytes_on_disk=folder.weights.bytes_on_disk,
        source=str(path),
    )
    notes, mark = (*folder.notes, *_notes(folder, name, scheme)), fingerprint(folder)
    return Checkpoint(config, params, folder.tokenizer, folder.template, mark, summary, notes)


def _one_device(mesh: Any, device: Any) -> Any:
    """Return the device that was asked for, None for the default; for a mesh one of its devices."""
    if mesh is None:
        return find_device(device) if isinstance(device, str) else device
    if not isinstance(mesh, Mesh) or device is not None:
        raise UsageError(
            f"mesh={mesh!r} and device={device!r} do not say where the parameters go.",
            "A mesh is a jax.sharding.Mesh, and names all devices.",
            "Use glm2_jax.make_mesh, and leave device out.",
        )
    return mesh.devices.flat[0]


def _notes(folder: Folder, dtype: str, scheme: Scheme | None) -> tuple[str, ...]:
    if folder.scheme is not None and scheme is None:
        return (
            f"the weights are stored in {folder.scheme.name}; "
            f"they were dequantized to {dtype} and take the memory of that",
        )
    notes = []
    if folder.scheme is None and scheme is not None:
        what = "the matrices of the layers"
        what += ", the embedding and the head" if scheme.embeddings else ""
        notes.append(f"{what} were quantized to int{scheme.bits}")
    if folder.float_dtype != dtype:
        which = "the weights" if scheme is None else "the other weights"
        notes.append(f"{which} are stored in {folder.float_dtype}; converted to {dtype}")
    return tuple(notes)
