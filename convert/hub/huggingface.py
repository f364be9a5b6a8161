"""Hugging Face through huggingface_hub: its listing, its cache, its transfer."""

import fcntl
import io
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    errors,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
    utils,
)
from huggingface_hub.file_download import http_get

from convert.files.manifest import sha256_of
from convert.hub.clients import (
    Count,
    damaged,
    explaining,
    first_line,
    general_error,
    is_network_error,
    no_such_model,
    refused,
)
from glm2_jax.errors import CheckpointError, GLMError, InputError, UsageError

_TRIES = 3  # in a row without a single new byte; the client itself tries some more


class HuggingFace:
    """Hugging Face, or a mirror of it that HF_ENDPOINT names."""

    source, hub = "hf", "Hugging Face"

    def __init__(self, name: str, revision: str | None):
        self.name, self.revision, self.commit = name, revision or "main", ""
        self.cache = Path(constants.HF_HUB_CACHE)
        self.offline = "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else None
        self.endpoint = constants.ENDPOINT
        self.sizes: dict[str, int] = {}
        self.sums: dict[str, str] = {}

    def cached_folder(self) -> Path | None:
        found = None
        with suppress(errors.HFValidationError):  # a name that the hub gives to no model
            found = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
        return Path(found).parent if isinstance(found, str) else None

    def list_files(self) -> dict[str, int]:
        with self._quiet():
            info = HfApi().model_info(self.name, revision=self.revision, files_metadata=True)
        self.commit = info.sha or self.revision
        for file in info.siblings or ():
            self.sizes[file.rfilename] = file.size or 0
            # Large files are kept by their sha256; that is their name in the cache, too.
            if file.lfs is not None and re.fullmatch("[0-9a-f]{64}", file.lfs.sha256):
                self.sums[file.rfilename] = file.lfs.sha256
        return self.sizes

    def bytes_here(self, file: str) -> int:
        if self._is_here(file):
            return self.sizes[file]
        part = self._blob(file)[1] if file in self.sums else None
        return min(part.stat().st_size, self.sizes[file]) if part and part.exists() else 0

    def _is_here(self, file: str) -> bool:
        linked = try_to_load_from_cache(self.name, file, revision=self.commit)
        return isinstance(linked, str) or (file in self.sums and self._blob(file)[0].exists())

    def fetch(self, file: str, count: Count) -> Path:
        small = file not in self.sums and not self._is_here(file)
        with self._quiet():
            if file in self.sums and not self._is_here(file):
                self._fetch_blob(file, count)
            # The client finds the large file in its place and links it.
            path = Path(hf_hub_download(self.name, file, revision=self.commit))
            if file == "config.json" and self.revision != self.commit:
                hf_hub_download(self.name, file, revision=self.revision)  # which notes the commit
        count(self.sizes[file] if small else 0)
        return path

    def _blob(self, file: str) -> tuple[Path, Path]:
        """Where the cache keeps a large file, and a part of it."""
        folder = self.cache / f"models--{self.name.replace('/', '--')}" / "blobs"
        return folder / self.sums[file], folder / f"{self.sums[file]}.incomplete"

    def _fetch_blob(self, file: str, count: Count) -> None:
        """Fetches a large file with the client's own transfer, from where an earlier run ended.

        `hf_hub_download` does not go on with a file after the process has ended.
        """
        blob, part = self._blob(file)
        part.parent.mkdir(parents=True, exist_ok=True)
        with _Part(part, count) as target:
            self._transfer(file, target)
            if sha256_of(part) != self.sums[file]:
                target.truncate(0)
                raise damaged(file, self.hub)
            part.replace(blob)

    def _transfer(self, file: str, target: "_Part") -> None:
        url, size = hf_hub_url(self.name, file, revision=self.commit), self.sizes[file]
        tries = 0
        while (start := target.seek(0, os.SEEK_END)) < size:
            try:
                http_get(
                    url,
                    target,  # type: ignore[arg-type]
                    resume_size=start,
                    headers=utils.build_hf_headers(),
                    expected_size=size,
                )
            except Exception as error:
                tries = 0 if target.tell() > start else tries + 1
                if tries == _TRIES or not is_network_error(error):
                    raise
                time.sleep(1)
        target.truncate(size)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keeps the client from writing to stderr, and makes its errors ours."""
        level, bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
        utils.logging.set_verbosity(logging.CRITICAL)
        if bars:
            utils.disable_progress_bars()
        try:
            with explaining(self._explain):
                yield
        finally:
            utils.logging.set_verbosity(level)
            if bars:
                utils.enable_progress_bars()

    def _explain(self, error: Exception) -> GLMError | None:
        page = f"{self.endpoint}/{self.name}"
        if isinstance(error, errors.GatedRepoError):
            return CheckpointError(
                f"{self.name} is gated: its owners decide who may have it.",
                f"{page} refused the request.",
                "Ask for access there, then log in with `hf auth login` or set HF_TOKEN.",
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return no_such_model(self.name, self.endpoint, "`hf auth login` or HF_TOKEN")
        if isinstance(error, errors.RevisionNotFoundError):
            return CheckpointError(
                f"{self.name} has no revision {self.revision} at {self.endpoint}.",
                fix="Leave --revision out, or take a branch, tag or commit that is listed there.",
            )
        if isinstance(error, errors.HFValidationError):
            return UsageError(f"{self.name!r} is no name of a model.", first_line(error))
        if isinstance(error, errors.HfHubHTTPError):
            return refused(self.endpoint, error.response.status_code)
        return general_error(error, self.endpoint, self.hub, "HF_ENDPOINT")


class _Part(io.FileIO):
    """A file that is being fetched: appended to, held by one process, its bytes counted."""

    def __init__(self, path: Path, count: Count):
        super().__init__(path, "a")
        self.count = count
        try:
            fcntl.flock(self, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise InputError(
                f"Another process is fetching {path}.",
                fix="Wait until it has ended, then run the same command again.",
            ) from error

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += super().write(view[written:])
        self.count(written)
        return written

    def truncate(self, size: int | None = None) -> int:
        before = os.fstat(self.fileno()).st_size
        after = super().truncate(size)
        self.count(after - before)  # bytes that have to be fetched again
        return after
