"""Opens the weights of a folder as one dictionary of tensors, however many files hold them."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from convert.files.aliases import is_computed, plain_name
from convert.files.foreign import explain_folder
from convert.files.safetensors_reader import parse_json, read_safetensors_file
from convert.files.tensor import StoredTensor, bad_file, is_plain_name, regular_file_size
from convert.files.torch_reader import read_torch_file
from glm2_jax.errors import CheckpointError, shorten

# Where weights are looked for, in the order of transformers' `from_pretrained`: the first that
# exists is read, and has to be complete.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Files that hold weights, or list them, and files of training runs that only look like it.
_LOOKS_LIKE_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)|.*\.index\.json"
)
_TRAINING_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|zero_pp_rank).*"
)
_NAMED = 3  # files in a note
MAX_JSON_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a folder, the files they are in, and the index that lists those.

    `left_out`: names of other files of the folder that hold weights, or list them.
    """

    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    index: Path | None = None
    left_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the file that was chosen: the index, or the only file."""
        return (self.index or self.files[0]).name

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for the user: which of several sets of weights is read."""
        if not self.left_out:
            return ()
        more = len(self.left_out) - _NAMED
        names = ", ".join(self.left_out[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        return (f"weights are read from {self.name}; left out: {names}",)

    @property
    def bytes_on_disk(self) -> int:
        """Size of the weight files together."""
        return sum(file.stat().st_size for file in self.files)


def choose_weights(names: Collection[str]) -> str | None:
    """Return which of `WEIGHT_FILES` is read, of the files of a folder or a repository."""
    return next((name for name in WEIGHT_FILES if name in names), None)


def open_weights(folder: Path, named: str | None = None) -> Weights:
    """List the tensors of a folder without reading their data.

    It holds one of `WEIGHT_FILES`, or the file `named`, which is `transformers_weights` of
    config.json; files may be symbolic links, as in a hub cache. A `CheckpointError` for no weights,
    a shard that is missing, truncated, swapped or outside the folder, or a name that appears twice.
    """
    entries = sorted(folder.iterdir())
    files = [path.name for path in entries if path.is_file()]
    # A broken link is taken where nothing else is there: its message says what happened.
    name = named or choose_weights(files) or choose_weights([path.name for path in entries])
    if name is None:
        raise explain_folder(folder) or CheckpointError(
            f"{folder} holds no weights.",
            f"It holds none of {', '.join(WEIGHT_FILES)}, but "
            f"{', '.join(path.name for path in entries[:12])}.",
            "Download the complete repository, the index file included.",
        )
    first = folder / name
    if first.suffix == ".json":
        found = _open_index(folder, first, files)
    else:
        found = Weights(read_weight_file(first), (first,))
    read = {name, *(path.name for path in found.files)}
    left_out = [
        file
        for file in files
        if file not in read
        and _LOOKS_LIKE_WEIGHTS.fullmatch(file)
        and not _TRAINING_STATE.fullmatch(file)
    ]
    return dataclasses.replace(found, left_out=tuple(left_out))


def read_weight_file(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one `.safetensors` or `.bin` file."""
    return (read_safetensors_file if path.suffix == ".safetensors" else read_torch_file)(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size; what is none is a `CheckpointError`."""
    if regular_file_size(path) > MAX_JSON_BYTES:
        what = f"is larger than {MAX_JSON_BYTES} bytes"
        raise bad_file(path, what, "Files of this kind have a few thousand.")
    value = parse_json(path, path.read_bytes())
    if not isinstance(value, dict):
        raise bad_file(path, "is not a JSON object", f"It holds {shorten(value)}.")
    return value


def _open_index(folder: Path, index: Path, present: Collection[str]) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad_file(index, "has no weight_map", "It must say which file holds a tensor.")
    for name in set(map(str, weight_map.values())):
        check_file_name(index, name)
    files = {name: folder / name for name in dict.fromkeys(weight_map.values())}
    missing = [x for x, path in files.items() if not path.exists() and not path.is_symlink()]
    if missing:
        other = choose_weights([name for name in present if name != index.name])
        instead = f", or remove {index.name}: {other} is then read" if other else ""
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:20])}.",
            f"{index.name} lists them.",
            f"Download them into the folder{instead}.",
        )
    tensors: dict[str, StoredTensor] = {}
    for path in files.values():
        for name, tensor in read_weight_file(path).items():
            if name in tensors and not is_computed(name):
                what = f"holds {name[:200]!r}, which is in {tensors[name].file.name}, too"
                raise bad_file(path, what, "Every tensor must appear once.")
            tensors[name] = tensor
    plain = {plain_name(name) for name in tensors}
    for name, file in weight_map.items():
        found = tensors.get(name)
        if found is None and (is_computed(name) or plain_name(name) in plain):
            continue  # no file needs it: it is computed, or stored under another name
        if found is None or (found.file != files[file] and not is_computed(name)):
            raise CheckpointError(
                f"{name[:200]!r} is not in {file}, where {index.name} puts it.",
                f"It is in {found.file.name}; the two shards may have been swapped or renamed."
                if found
                else "No shard holds it.",
                "Download the shards again, or give them their original names.",
            )
    return Weights(tensors, tuple(files.values()), index)


def check_file_name(index: Path, name: str) -> None:
    """Refuse all but plain names of files next to the index: no path, no `..`."""
    if not is_plain_name(name) or not name.endswith((".safetensors", ".bin")):
        raise CheckpointError(
            f"{index} names the file {name[:200]!r}.",
            "Shards must be .safetensors or .bin files in the same folder, without a path.",
            "Do not use this folder unless you know why its index points elsewhere.",
        )
