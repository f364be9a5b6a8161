"""A cache of scans of large files in the user's cache folder, so that they are encoded only once.

An entry is the result of `train.data.scan.scan`: places and lengths of sequences, about 45 bytes
each, no text and no tokens. Its name is a hash of everything that it depends on: the contents of
the file, the tokenizer, how rows are read, and the code that reads them. It gets this name when it
is complete, so parallel and killed processes cannot harm each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from glm2_jax.cli.messages import note
from glm2_jax.runtime.compile_cache import trim, user_cache
from infer.datasets.index import DataFile
from train.data.scan import COLUMNS, Reading, Scan, scan

VARIABLE = "GLM2_JAX_DATA_CACHE"
MAX_BYTES = 2**30
SMALL = 2**20  # bytes of a file that is encoded in a few seconds
_ENDING = "-cache"
_FACTS = ("format", "by_line", "rows", "bad", "bad_reasons", "unused", "marked")
_CODE = (
    "glm2_jax.text.prompt", "glm2_jax.text.tokenizer", "infer.requests.request",
    "infer.datasets.encode", "infer.datasets.formats", "infer.datasets.index",
    "infer.datasets.tables", "train.data.scan",
)  # fmt: skip


def cached_scan(
    file: DataFile, reading: Reading, progress: Callable[[int], None], folder: str | None
) -> Scan:
    """Return what `scan` finds, for a large file from the cache where it has an entry.

    `folder`: None = $GLM2_JAX_DATA_CACHE or the user's cache folder; "off" = no cache.
    """
    place = None
    if file.size > SMALL:
        try:
            place = user_cache("data", VARIABLE, folder)
        except (OSError, RuntimeError) as error:  # no home folder
            note(f"warning: no data cache ({error})")
    if place is None:
        return scan(file, reading, progress)
    digest = file.digest()
    path = place / (_key(digest, file.kind, reading) + _ENDING)
    found = _read(path)
    if found is not None:
        file.restore(digest, found.by_line)
        progress(file.size)
        return found
    found = scan(file, reading, progress)
    if file.sha256 == digest:  # it did not change meanwhile
        try:
            _write(path, found)
        except OSError as error:
            note(f"warning: the data cache cannot be written ({error})")
    return found


def _write(path: Path, found: Scan) -> None:
    facts = json.dumps({name: getattr(found, name) for name in _FACTS})
    arrays: dict[str, Any] = {"facts": np.array(facts), **found.columns}
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_ENDING}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
        trim(path.parent, MAX_BYTES)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _read(path: Path) -> Scan | None:
    """Return an entry, or None where there is none that can be read."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            facts = json.loads(str(stored["facts"]))
            columns = {name: stored[name] for name in COLUMNS}
        if len({len(values) for values in columns.values()}) != 1 or set(facts) != set(_FACTS):
            return None
        os.utime(path)  # the oldest ones are deleted first
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    counters = {name: Counter(facts[name]) for name in ("bad_reasons", "unused")}
    bad = [tuple(entry) for entry in facts["bad"]]
    return Scan(**facts | counters | {"bad": bad, "columns": columns})


def _key(digest: str, kind: str, reading: Reading) -> str:
    encoder, tokenizer = reading.encoder, reading.encoder.tokenizer
    parts = [
        _code(), digest, kind, hashlib.sha256(tokenizer.model_bytes).hexdigest(), tokenizer.family,
        sorted(tokenizer.special.items()), sorted(map(repr, tokenizer.added.values())),
        encoder.template, encoder.train_on_prompt, reading.max_length, reading.fmt,
        reading.preferred,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@cache
def _code() -> str:
    """Return a hash of the code that an entry depends on."""
    digest = hashlib.sha256()
    for name in _CODE:
        digest.update(Path(str(sys.modules[name].__file__)).read_bytes())
    return digest.hexdigest()
