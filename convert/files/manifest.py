"""`manifest.json`: what a folder of our own format says about itself, and the check of its sums."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.files.shards import WEIGHT_FILES, Weights, open_weights, read_json
from convert.files.tensor import is_plain_name, reading, regular_file_size
from glm2_jax.choices import ROPE_KINDS, STORED_DTYPES, TEMPLATES
from glm2_jax.config import shorten
from glm2_jax.errors import CheckpointError
from glm2_jax.schemes import SCHEMES, Scheme

MANIFEST = "manifest.json"
FORMAT = "glm2-jax"
FORMAT_VERSION = 1

_CHOICES = {
    "dtype": STORED_DTYPES,
    "rope_kind": ROPE_KINDS,
    "template": TEMPLATES,
    "quantization": (None, *SCHEMES),
}

_READ_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 in hex of one file."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder holds and where it came from.

    Attributes:
        source: the folder or the training run that it was made from.
        dtype: type of the weights, e.g. "bfloat16".
        quantization: None, or the name of one of `glm2_jax.schemes.SCHEMES`.
        rope_kind: "linear" or "base".
        template: prompt template.
        files: name -> size and sum, of every file but the manifest itself.
    """

    source: str
    dtype: str
    rope_kind: str
    template: str
    files: dict[str, FileEntry]
    quantization: str | None = None

    @property
    def scheme(self) -> Scheme | None:
        """How the matrices are quantized."""
        return None if self.quantization is None else SCHEMES[self.quantization]

    def to_json(self) -> str:
        """The text of the file."""
        value = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `manifest.json`.

    Raises:
        CheckpointError: not ours, of a newer version, or damaged.
    """
    path = folder / MANIFEST
    with reading(path):
        raw = read_json(path)
    if raw.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a manifest of this project.",
            f"Its format is {shorten(raw.get('format'))} instead of {FORMAT!r}.",
            "Remove the file if the folder is an official checkpoint.",
        )
    version = raw.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by another version of this project.",
            f"format_version {shorten(version)}; known: {FORMAT_VERSION}.",
            "Update glm2-jax.",
        )
    try:
        return _parse(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged.", f"{type(error).__name__}: {error}", "Convert the source again."
        ) from error


def _parse(raw: dict[str, Any]) -> Manifest:
    if "quantisation" in raw:  # the key of folders written before 0.2
        raw["quantization"] = raw.pop("quantisation")
    for key, choices in _CHOICES.items():
        if raw[key] not in choices:
            known = ", ".join(map(str, choices))
            raise ValueError(f"{key} is {shorten(raw[key])}, not one of {known}")
    if not isinstance(raw["source"], str):
        raise ValueError(f"source is {shorten(raw['source'])}, not a text")
    if not isinstance(raw["files"], dict):
        raise ValueError("files is not an object")
    files = {name: _file_entry(name, entry) for name, entry in raw["files"].items()}
    return Manifest(source=raw["source"], files=files, **{key: raw[key] for key in _CHOICES})


def _file_entry(name: str, entry: Any) -> FileEntry:
    if not is_plain_name(name):
        raise ValueError(f"the file name {shorten(name)} is a path or no plain name")
    size, sha256 = entry["size"], entry["sha256"]
    if type(size) is not int or not isinstance(sha256, str):
        raise ValueError(f"the size or the sum of {shorten(name)} is none")
    return FileEntry(size, sha256)


def check_listed(folder: Path, manifest: Manifest, weights: Weights) -> None:
    """Refuses a folder of our own format that holds weights beyond what its manifest lists.

    Raises:
        CheckpointError: names the files.
    """
    read = [folder / "config.json", folder / "tokenizer.model", *weights.files]
    if weights.index is not None:
        read.append(weights.index)
    names = [path.name for path in read]
    if any(name in WEIGHT_FILES and "safetensors" in name for name in weights.left_out):
        names += weights.left_out  # another set of the format that is ours
    unlisted = [name for name in names if name not in manifest.files]
    if unlisted:
        raise CheckpointError(
            f"{folder} holds files that {MANIFEST} does not list: {', '.join(unlisted[:20])}.",
            "They were added or renamed after it was written.",
            "Remove them, or convert the source again.",
        )


def sha256_of(path: Path, progress: Callable[[int], None] = lambda done: None) -> str:
    """The sum of a file in hex; `progress` gets the number of bytes read since the last call."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def verify_checkpoint(
    path: str | Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Manifest:
    """Compares every file of our own format with the manifest.

    Args:
        path: the folder.
        progress: called with the bytes read and the bytes to read.

    Returns:
        The manifest.

    Raises:
        CheckpointError: no manifest, or files that are absent or differ; all are named.
    """
    folder = Path(path)
    with reading(folder):
        present = (folder / MANIFEST).exists()
    if not present:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, so there is nothing to verify it against.",
            "Only folders written by this project carry one.",
            "Compare the sha256 of the files with the published ones.",
        )
    manifest = read_manifest(folder)
    total = sum(entry.size for entry in manifest.files.values())
    done = 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress(done, total)

    problems = []
    for name, entry in manifest.files.items():
        try:
            with reading(folder / name):
                size = regular_file_size(folder / name)
                if size != entry.size:
                    problems.append(f"{name} has {size} bytes instead of {entry.size}.")
                elif sha256_of(folder / name, count) != entry.sha256:
                    problems.append(f"{name} differs: its sha256 is not the one in the manifest.")
        except CheckpointError as error:
            problems.append(error.what)
    if problems:
        raise CheckpointError(f"{folder} is not as it was written.", problems, "Convert it again.")
    with reading(folder):
        check_listed(folder, manifest, open_weights(folder))
    return manifest
