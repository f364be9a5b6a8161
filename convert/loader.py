"""`load_checkpoint`: a folder becomes parameters on a device, one tensor at a time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.folder import Folder, fingerprint, open_folder
from convert.names import PARTS, Part
from convert.place import DevicePlace, HostPlace, new_place
from convert.values import Values, cast
from glm2_jax.config import GLMConfig
from glm2_jax.dtypes import dtype_name, resolve_dtype
from glm2_jax.errors import DeviceError, UsageError
from glm2_jax.tokenizer import Tokenizer

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class CheckpointSummary:
    """What was found and what became of it.

    Attributes:
        layout: "own", "official", "official int4" or "official int8".
        family: "chatglm2", "chatglm3" or "codegeex2".
        stored_dtype: type of most of the stored weights.
        dtype: type of the parameters in memory.
        num_params: number of parameters.
        bytes_on_disk: size of the weight files.
        source: the folder, as given.
    """

    layout: str
    family: str
    stored_dtype: str
    dtype: str
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
        fingerprint: identifies the base, see `convert.folder.fingerprint`.
        summary: what was found.
        notes: what the user should be told, one line each.
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
    mesh: Any = None,
    rope_kind: str | None = None,
    template: str | None = None,
    device: Any = None,
    progress: Progress = lambda done, total: None,
) -> Checkpoint:
    """Opens a checkpoint folder: official (`.bin`, safetensors, int4, int8) or our own.

    Peak memory beyond the parameters themselves is a few chunks of a few megabytes; mapped pages
    of the files do not count. Every number is checked for NaN and infinity on the way.

    Args:
        path: the folder.
        dtype: "auto" or the name of a type, e.g. "bfloat16".
        quantize: must be None in this version.
        mesh: must be None in this version.
        rope_kind: "linear" or "base", where the folder does not tell what `rope_ratio` means.
        template: "chatglm2", "chatglm3" or "raw" instead of the family's own.
        device: a `jax.Device`, the name of a platform, or None for the default device.
        progress: called with the bytes of parameters done and to do.

    Raises:
        UsageError: an argument that makes no sense or that this version does not do.
        CheckpointError: the folder cannot be opened; the message says which file and why.
        DeviceError: no such device.
    """
    for name, value in (("quantize", quantize), ("mesh", mesh)):
        if value is not None:
            raise UsageError(
                f"{name}={value!r} is not supported.",
                f"This version loads checkpoints without {name}.",
                f"Leave {name} out.",
            )
    device = _find_device(device)
    folder = open_folder(path, rope_kind=rope_kind, template=template)
    config = folder.config
    target = resolve_dtype(dtype, num_params=config.num_params, device=device)
    return Checkpoint(
        config=config,
        params=_load_params(folder, target, device, progress),
        tokenizer=folder.tokenizer,
        template=folder.template,
        fingerprint=fingerprint(folder),
        summary=CheckpointSummary(
            layout=folder.layout,
            family=config.family,
            stored_dtype=folder.stored_dtype,
            dtype=dtype_name(target),
            num_params=config.num_params,
            bytes_on_disk=folder.weights.bytes_on_disk,
            source=str(path),
        ),
        notes=_notes(folder, dtype_name(target)),
    )


def _find_device(device: Any) -> Any:
    if not isinstance(device, str):
        return device
    try:
        return jax.devices(device)[0]
    except RuntimeError as error:
        raise DeviceError(
            f"There is no device {device!r} here.",
            str(error).splitlines()[0],
            f"jax sees: {', '.join(str(found) for found in jax.devices())}.",
        ) from error


def _notes(folder: Folder, dtype: str) -> tuple[str, ...]:
    notes = []
    if folder.bits:
        notes.append(
            f"the weights are stored in int{folder.bits}; "
            f"they were dequantised to {dtype} and take the memory of that"
        )
    elif folder.stored_dtype != dtype:
        notes.append(f"the weights are stored in {folder.stored_dtype}; converted to {dtype}")
    return tuple(notes)


def _load_params(folder: Folder, dtype: np.dtype, device: Any, progress: Progress) -> dict:
    """Fills the stacked arrays in the order of the files, so that disks read forwards."""
    config, loading = folder.config, _Loading(folder.config, dtype, device)
    total, done = config.num_params * dtype.itemsize, 0
    for match in folder.matches:
        values = Values(match, config, folder.bits)
        for part, start, stop in match.rule.ranges(config):
            for begin, chunk in values.chunks(start, stop):
                if dtype == np.float16:
                    chunk = cast(chunk, dtype, match.name)
                loading.write(part, match.layer or 0, begin - start, chunk)
                done += len(chunk) * dtype.itemsize
                progress(done, total)
            loading.complete(part)
    return loading.params


class _Loading:
    """The places of all parameters; each becomes a jax array as soon as its last layer is in."""

    def __init__(self, config: GLMConfig, dtype: np.dtype, device: Any):
        self.config, self.dtype, self.device = config, dtype, device
        self.places: dict[tuple[str, ...], HostPlace | DevicePlace] = {}
        self.missing = {part.path: self._layers(part) for part in PARTS}
        self.params: dict[str, Any] = {}

    def _layers(self, part: Part) -> int:
        return self.config.num_layers if part.path[0] == "layers" else 1

    def write(self, part: Part, layer: int, start: int, chunk: np.ndarray) -> None:
        place = self.places.get(part.path)
        if place is None:
            layers, shape = self._layers(part), part.shape(self.config)
            stacked = (layers, *shape) if part.path[0] == "layers" else shape
            place = new_place(stacked, self.dtype, layers, self.device)
            self.places[part.path] = place
        place.write(layer, start, chunk)

    def complete(self, part: Part) -> None:
        """One layer of a part is in."""
        self.missing[part.path] -= 1
        if self.missing[part.path]:
            return
        array = self.places.pop(part.path).finish()
        *parents, name = part.path
        branch = self.params
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = array
