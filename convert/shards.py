"""The weights of a folder as one dictionary of tensors, whichever files they are spread over."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from convert.safetensors_file import read_safetensors_file, unique_pairs
from convert.stored import StoredTensor, is_plain_name, regular_file_size
from convert.torch_zip import read_torch_file
from glm2_jax.config import shorten
from glm2_jax.errors import CheckpointError

# Where weights are looked for, the safest and fastest format first.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
MAX_JSON_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a folder, the files they are in, and the index that lists those."""

    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    index: Path | None = None

    @property
    def bytes_on_disk(self) -> int:
        """Size of the weight files together."""
        return sum(file.stat().st_size for file in self.files)


def open_weights(folder: Path) -> Weights:
    """Lists the tensors of a folder without reading their data.

    Args:
        folder: holds one of `WEIGHT_FILES`; safetensors are preferred. Files may be symbolic
            links, as in a hub cache.

    Raises:
        CheckpointError: no weights, a shard absent, cut, swapped with another or outside the
            folder, or a name that is there twice.
    """
    # A link that leads nowhere counts as present: its own message says what happened.
    present = [name for name in WEIGHT_FILES if _is_there(folder / name)]
    if not present:
        names = sorted(path.name for path in folder.iterdir())
        raise CheckpointError(
            f"{folder} holds no weights.",
            f"None of {', '.join(WEIGHT_FILES)} is there; it holds {', '.join(names[:12])}.",
            "Download the whole repository, the index file included.",
        )
    first = folder / present[0]
    if first.suffix != ".json":
        return Weights(read_weight_file(first), (first,))
    return _open_index(folder, first)


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def read_weight_file(path: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of one `.safetensors` or `.bin` file."""
    reader = read_safetensors_file if path.suffix == ".safetensors" else read_torch_file
    return reader(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; a name that is there twice is an error.

    Raises:
        CheckpointError: absent, too large, not UTF-8, not JSON, not an object.
    """
    if regular_file_size(path) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} is larger than {MAX_JSON_BYTES} bytes.",
            "Files of this kind have a few thousand.",
            "Download it again.",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text, object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be parsed.", str(error)[:200], "Download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} is not a JSON object.", f"It holds {shorten(value)}.", "Download it again."
        )
    return value


def _open_index(folder: Path, index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.", fix="Download it again.")
    for name in set(map(str, weight_map.values())):
        check_file_name(index, name)
    files = {name: folder / name for name in dict.fromkeys(weight_map.values())}
    absent = [name for name, path in files.items() if not _is_there(path)]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of {len(files)} shards: {', '.join(absent[:20])}.",
            f"{index.name} lists them.",
            "Download them into the folder.",
        )
    shards = {name: read_weight_file(path) for name, path in files.items()}
    _check_places(index, weight_map, shards)
    tensors: dict[str, StoredTensor] = {}
    for name, shard in shards.items():
        for tensor_name, tensor in shard.items():
            if tensor_name in tensors:
                raise CheckpointError(
                    f"{tensor_name[:200]!r} is in {tensors[tensor_name].file.name} and in {name}.",
                    "Every tensor must be there once.",
                )
            tensors[tensor_name] = tensor
    return Weights(tensors, tuple(files.values()), index)


def check_file_name(index: Path, name: str) -> None:
    """Only plain names of files beside the index: nothing absolute, no separators, no `..`."""
    if not is_plain_name(name) or not name.endswith((".safetensors", ".bin")):
        raise CheckpointError(
            f"{index} names the file {name[:200]!r}.",
            "Shards must be .safetensors or .bin files in the same folder, without a path.",
            "Do not use this folder unless you know why its index points elsewhere.",
        )


def _check_places(
    index: Path, weight_map: dict[str, str], shards: dict[str, dict[str, StoredTensor]]
) -> None:
    """Every tensor must be in the shard that the index names."""
    elsewhere = {name: file for file, shard in shards.items() for name in shard}
    for name, file in weight_map.items():
        if name in shards[file]:
            continue
        found = elsewhere.get(name)
        if found is None:
            why = "No shard holds it."
        else:
            why = f"It is in {found}; the two shards may have been swapped or renamed."
        raise CheckpointError(
            f"{name[:200]!r} is not in {file}, where {index.name} puts it.",
            why,
            "Download the shards again, or give them their own names back.",
        )
