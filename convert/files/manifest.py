"""Reads `manifest.json`, which describes a folder of our own format, and checks its checksums."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from convert.files.shards import WEIGHT_FILES, Weights, open_weights, read_json
from convert.files.tensor import is_plain_name, reading, regular_file_size
from glm2_jax.choices import ROPE_KINDS, STORED_DTYPES, TEMPLATES
from glm2_jax.errors import CheckpointError, shorten
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
    """What a folder holds, and its `source`: the folder or the training run it was made from."""

    source: str
    dtype: str
    rope_kind: str
    template: str
    files: dict[str, FileEntry]  # of every file but the manifest itself
    quantization: str | None = None  # the name of a scheme

    @property
    def scheme(self) -> Scheme | None:
        """How the matrices are quantized."""
        return None if self.quantization is None else SCHEMES[self.quantization]

    def to_json(self) -> str:
        """Return the text of the file."""
        value = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`; one that is not ours, newer or damaged is a `CheckpointError`."""
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
    if "quantisation" in raw:  # the key of folders written before 0.2
        raw["quantization"] = raw.pop("quantisation")
    try:
        for key, choices in _CHOICES.items():
            if raw[key] not in choices:
                known = ", ".join(map(str, choices))
                raise ValueError(f"{key} is {shorten(raw[key])}, not one of {known}")
        source, files = raw["source"], raw["files"]
        if not isinstance(source, str) or not isinstance(files, dict):
            raise ValueError("source must be a string, and files an object")
        for name, entry in files.items():
            if not is_plain_name(name):
                raise ValueError(f"{shorten(name)} is not a plain file name")
            if type(entry["size"]) is not int or not isinstance(entry["sha256"], str):
                raise ValueError(f"the size or the checksum of {shorten(name)} is not valid")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged.", f"{type(error).__name__}: {error}", "Convert the source again."
        ) from error
    entries = {name: FileEntry(entry["size"], entry["sha256"]) for name, entry in files.items()}
    return Manifest(source=source, files=entries, **{key: raw[key] for key in _CHOICES})


def check_listed(folder: Path, manifest: Manifest, weights: Weights) -> None:
    """Refuse a folder of our own format that holds weights beyond what its manifest lists."""
    read = [folder / "config.json", folder / "tokenizer.model", *weights.files, weights.index]
    names = [path.name for path in read if path is not None]
    if any(name in WEIGHT_FILES and "safetensors" in name for name in weights.left_out):
        names += weights.left_out  # another set of weights in our format
    unlisted = [name for name in names if name not in manifest.files]
    if unlisted:
        raise CheckpointError(
            f"{folder} holds files that {MANIFEST} does not list: {', '.join(unlisted[:20])}.",
            "They were added or renamed after it was written.",
            "Remove them, or convert the source again.",
        )


def sha256_of(path: Path, progress: Callable[[int], None] = lambda done: None) -> str:
    """Return the sha256 of a file in hex; `progress` gets the bytes read since the last call."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def verify_checkpoint(
    path: str | Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Manifest:
    """Compare every file of our own format with the manifest.

    Args:
        path: the folder.
        progress: called with the bytes read and the bytes to read.

    Returns:
        The manifest.

    Raises:
        CheckpointError: there is no manifest, or files are missing or differ; all are named.
    """
    folder = Path(path)
    with reading(folder):
        present = (folder / MANIFEST).exists()
    if not present:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, so there is nothing to verify it against.",
            "Only folders written by this project have one.",
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
        raise CheckpointError(f"{folder} was changed or damaged.", problems, "Convert it again.")
    with reading(folder):
        check_listed(folder, manifest, open_weights(folder))
    return manifest
