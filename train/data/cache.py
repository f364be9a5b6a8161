"""What large files hold, kept in the user's cache folder, so that they are encoded once only.

An entry is what `train.data.scan` finds: places and lengths of sequences, about 45 bytes each, no
text and no tokens. Its name is a sum over everything that it depends on: the contents of the file,
the tokenizer, how rows are read, and the code that reads them. It gets this name when it is
complete, so processes at the same time, and killed ones, cannot harm each other.
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

from glm2_jax.runtime.compile_cache import trim, user_cache
from infer.datasets.index import DataFile
from train.data.scan import COLUMNS, Reading, Scan, scan

VARIABLE = "GLM2_JAX_DATA_CACHE"
MAX_BYTES = 2**30
SMALL = 2**20  # bytes of a file that is encoded in a few seconds
_ENDING = "-cache"
_CODE = (
    "glm2_jax.text.prompt", "glm2_jax.text.tokenizer", "infer.requests.request",
    "infer.datasets.encode", "infer.datasets.formats", "infer.datasets.index",
    "infer.datasets.tables", "train.data.scan",
)  # fmt: skip


class ScanCache:
    """A folder of entries.

    Args:
        folder: of $GLM2_JAX_DATA_CACHE or the user's cache folder by default; "off" = none.
        warn: is told in one line why an entry could not be kept.
        small: bytes; of a file that is no larger nothing is kept.
    """

    def __init__(
        self,
        folder: str | None,
        warn: Callable[[str], None] = lambda line: None,
        small: int = SMALL,
    ):
        self._folder, self._warn, self._small = folder, warn, small

    def scan(self, file: DataFile, how: Reading, progress: Callable[[int], None]) -> Scan:
        """What `train.data.scan.scan` finds, from an entry where there is one."""
        if file.size <= self._small:
            return scan(file, how, progress)
        try:
            folder = user_cache("data", VARIABLE, self._folder)
        except (OSError, RuntimeError) as error:  # no home folder
            self._warn(f"warning: no cache of data ({error})")
            folder = None
        if folder is None:
            return scan(file, how, progress)
        digest = file.digest()
        path = folder / (_key(digest, file.kind, how) + _ENDING)
        found = _read(path)
        if found is None:
            found = scan(file, how, progress)
            if file.sha256 == digest:  # it did not change meanwhile
                self._write(path, found)
            return found
        file.restore(digest, found.by_line)
        progress(file.size)
        return found

    def _write(self, path: Path, found: Scan) -> None:
        facts = json.dumps({name: getattr(found, name) for name in _FACTS})
        arrays: dict[str, Any] = {"facts": np.array(facts), **found.columns}
        temporary = path.with_name(f"{path.name}.{os.getpid()}{_ENDING}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
            temporary.replace(path)
            trim(path.parent, MAX_BYTES)
        except OSError as error:
            self._warn(f"warning: what the data hold is not kept for the next start ({error})")
            with contextlib.suppress(OSError):
                temporary.unlink()


_FACTS = ("format", "by_line", "rows", "bad", "bad_reasons", "unused", "marked")


def _read(path: Path) -> Scan | None:
    """An entry, or None where there is none that can be read."""
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
    bad = [(line, row, reason) for line, row, reason in facts["bad"]]
    return Scan(**facts | counters | {"bad": bad, "columns": columns})


def _key(digest: str, kind: str, how: Reading) -> str:
    tokenizer = how.encoder.tokenizer
    parts = [
        _code(), digest, kind, hashlib.sha256(tokenizer.model_bytes).hexdigest(), tokenizer.family,
        sorted(tokenizer.special.items()), sorted(map(repr, tokenizer.added.values())),
        how.encoder.template, how.encoder.train_on_prompt, how.max_length, how.fmt, how.preferred,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@cache
def _code() -> str:
    """The sum of the code that an entry depends on."""
    digest = hashlib.sha256()
    for name in _CODE:
        digest.update(Path(str(sys.modules[name].__file__)).read_bytes())
    return digest.hexdigest()
