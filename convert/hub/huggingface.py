"""Hugging Face through huggingface_hub: its listing, its cache, its download."""

import fcntl
import os
import re
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import (
    HfApi,
    constants,
    errors,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from convert.files.manifest import sha256_of
from convert.hub.clients import Client, Count, is_network_error
from glm2_jax.errors import CheckpointError, GLMError

_TRIES = 3  # in a row without a single new byte
_NOT_FOUND = (
    errors.RepositoryNotFoundError,
    errors.RevisionNotFoundError,
    errors.HFValidationError,
)


class HuggingFace(Client):
    """A model on Hugging Face, or on a mirror that HF_ENDPOINT names."""

    source, hub, variable = "hf", "Hugging Face", "HF_ENDPOINT"
    login = "run `hf auth login` or set HF_TOKEN"

    def __init__(self, name: str, revision: str | None):
        self.name, self.revision = name, revision or "main"
        self.commit = self.revision
        self.endpoint, self.cache = constants.ENDPOINT, Path(constants.HF_HUB_CACHE)
        self.offline = "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else None
        self.sizes: dict[str, int] = {}
        self.sums: dict[str, str] = {}  # sha256 of the large files

    def cached(self, file: str) -> Path | None:
        with suppress(errors.HFValidationError):  # a name that the hub gives to no model
            found = try_to_load_from_cache(self.name, file, revision=self.commit)
            return Path(found) if isinstance(found, str) else None
        return None

    def list_files(self) -> dict[str, int]:
        with self.calling():
            info = HfApi().model_info(self.name, revision=self.revision, files_metadata=True)
        self.commit = info.sha or self.revision
        for file in info.siblings or ():
            self.sizes[file.rfilename] = file.size or 0
            if file.lfs is not None and re.fullmatch("[0-9a-f]{64}", file.lfs.sha256):
                self.sums[file.rfilename] = file.lfs.sha256
        return self.sizes

    def bytes_here(self, file: str) -> int:
        if self._is_here(file):
            return self.sizes[file]
        part = self._part(file) if file in self.sums else None
        return min(part.stat().st_size, self.sizes[file]) if part and part.exists() else 0

    def fetch(self, files: Collection[str], count: Count) -> Path:
        with self.calling():
            for file in files:
                if file in self.sums and not self._is_here(file):
                    self._fetch_large(file, count)
                # The client finds the large file in its cache and links it.
                path = Path(hf_hub_download(self.name, file, revision=self.commit))
            if self.revision != self.commit:  # the client notes the commit of the branch
                hf_hub_download(self.name, "config.json", revision=self.revision)
        return path.parent

    def explain(self, error: Exception) -> GLMError | None:
        if isinstance(error, errors.GatedRepoError):
            return CheckpointError(
                f"{self.name} is gated: its owners decide who may download it.",
                f"{self.endpoint}/{self.name} refused the request.",
                f"Ask for access there, then {self.login}.",
            )
        return self.not_found() if isinstance(error, _NOT_FOUND) else super().explain(error)

    def _is_here(self, file: str) -> bool:
        return bool(self.cached(file)) or (file in self.sums and self._blob(file).exists())

    def _blob(self, file: str) -> Path:
        """Return where the cache keeps a large file: under its sha256, as the client documents."""
        return self.cache / f"models--{self.name.replace('/', '--')}" / "blobs" / self.sums[file]

    def _part(self, file: str) -> Path:
        return self._blob(file).with_suffix(".incomplete")

    def _fetch_large(self, file: str, count: Count) -> None:
        """Download a large file into the client's cache, from where an earlier process stopped.

        `hf_hub_download` starts such a file again when the process before was killed.
        """
        blob, part = self._blob(file), self._part(file)
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as target:
            fcntl.flock(target, fcntl.LOCK_EX)  # waits for another process with the same file
            if not blob.exists():
                self._transfer(file, target, count)
                if sha256_of(part) != self.sums[file]:
                    target.truncate(0)
                    raise self.damaged(file)
                part.replace(blob)
        part.unlink(missing_ok=True)

    def _transfer(self, file: str, target: BinaryIO, count: Count) -> None:
        url, failures = hf_hub_url(self.name, file, revision=self.commit), 0
        while (start := target.seek(0, os.SEEK_END)) < self.sizes[file]:
            headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
            try:
                with get_session().stream(
                    "GET", url, headers=build_hf_headers() | headers
                ) as response:
                    hf_raise_for_status(response)
                    if start and response.status_code != 206:  # the server sends all of it
                        count(-start)
                        target.truncate(0)
                    for chunk in response.iter_raw():
                        target.write(chunk)
                        count(len(chunk))
                if target.tell() == start:
                    raise OSError("the server sent nothing")
            except Exception as error:
                failures = 0 if target.tell() > start else failures + 1
                if failures == _TRIES or not is_network_error(error):
                    raise
                time.sleep(1)
