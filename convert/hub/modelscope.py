"""ModelScope through modelscope_hub, the client that needs neither torch nor modelscope itself."""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelscope_hub import HubApi, HubConfig, ProgressCallback, errors

from convert.hub.clients import (
    Count,
    damaged,
    explaining,
    first_line,
    general_error,
    no_such_model,
    refused,
    unreachable,
)
from glm2_jax.errors import GLMError


class ModelScope:
    """ModelScope, or the server that MODELSCOPE_ENDPOINT names."""

    source, hub = "modelscope", "ModelScope"
    offline = None

    def __init__(self, name: str, revision: str | None):
        self.name, self.revision, self.commit = name, revision or "master", revision or "master"
        config = HubConfig()
        self.api, self.cache = HubApi(config), Path(config.cache_dir)
        self.files: dict[str, Any] = {}

    def cached_folder(self) -> Path | None:
        path = self._local("config.json")
        return path.parent if path is not None else None

    def _local(self, file: str) -> Path | None:
        with contextlib.suppress(errors.HubError, ValueError):
            return self.api.download_file(
                self.name, "model", file, revision=self.revision, local_files_only=True
            )
        return None

    def list_files(self) -> dict[str, int]:
        with self._quiet():
            endpoint = self.api.resolve_endpoint_for_read(self.name)
            self.api = HubApi(HubConfig(endpoint=endpoint))
            found = self.api.list_repo_files(self.name, "model", revision=self.revision)
        self.files = {file.path: file for file in found if not file.is_dir}
        return {path: file.size for path, file in self.files.items()}

    def bytes_here(self, file: str) -> int:
        path = self._local(file)
        return min(path.stat().st_size, self.files[file].size) if path is not None else 0

    def fetch(self, file: str, count: Count) -> Path:
        class Counting(ProgressCallback):
            def update(self, size: int) -> None:
                count(size)

        with self._quiet():
            return self.api.downloader.download_file(
                self.name,
                "model",
                file,
                revision=self.revision,
                expected_sha256=self.files[file].sha256,
                file_size=self.files[file].size,
                progress_callbacks=[Counting],
            )

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """As for the other client; this one has no switch for its bars."""
        logger = logging.getLogger("modelscope_hub")
        level, names = logger.level, sys.modules[type(self.api.downloader).__module__].__dict__
        bar = names.get("tqdm")
        logger.setLevel(logging.CRITICAL)
        if bar is not None:
            names["tqdm"] = functools.partial(bar, disable=True)
        try:
            with explaining(self._explain):
                yield
        finally:
            logger.setLevel(level)
            if bar is not None:
                names["tqdm"] = bar

    def _explain(self, error: Exception) -> GLMError | None:
        endpoint = self.api.legacy.endpoint
        if isinstance(error, errors.NotExistError):
            return no_such_model(self.name, endpoint, "MODELSCOPE_API_TOKEN", self.revision)
        if isinstance(error, errors.FileIntegrityError):
            return damaged(self.name, self.hub)
        if isinstance(error, errors.APIError):
            return refused(endpoint, first_line(error))
        if isinstance(error, errors.HubError):
            return unreachable(error, endpoint, self.hub, "MODELSCOPE_ENDPOINT")
        return general_error(error, endpoint, self.hub, "MODELSCOPE_ENDPOINT")
