"""ModelScope through modelscope_hub, the client that needs neither torch nor modelscope itself."""

import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from modelscope_hub import FileInfo, HubApi, HubConfig, ProgressCallback, errors

from convert.hub.clients import Client, Count
from glm2_jax.errors import GLMError


class ModelScope(Client):
    """A model on ModelScope, or on the server that MODELSCOPE_ENDPOINT names."""

    source, hub, variable = "modelscope", "ModelScope", "MODELSCOPE_ENDPOINT"
    login = "set MODELSCOPE_API_TOKEN"

    def __init__(self, name: str, revision: str | None):
        self.name, self.revision = name, revision or "master"
        self.commit = self.revision  # the hub does not name the commit
        config = HubConfig()
        self.api, self.cache = HubApi(config), Path(config.cache_dir)
        self.endpoint = self.api.legacy.endpoint
        self.files: dict[str, FileInfo] = {}

    def cached(self, file: str) -> Path | None:
        with suppress(errors.HubError, ValueError):
            return self.api.download_file(
                self.name, "model", file, revision=self.revision, local_files_only=True
            )
        return None

    def list_files(self) -> dict[str, int]:
        with self.calling():
            self.endpoint = self.api.resolve_endpoint_for_read(self.name)
            self.api = HubApi(HubConfig(endpoint=self.endpoint))
            found = self.api.list_repo_files(self.name, "model", revision=self.revision)
        self.files = {file.path: file for file in found if not file.is_dir}
        return {path: file.size for path, file in self.files.items()}

    def bytes_here(self, file: str) -> int:
        path = self.cached(file)
        return min(path.stat().st_size, self.files[file].size) if path is not None else 0

    def fetch(self, files: Collection[str], count: Count) -> Path:
        lock = threading.Lock()  # large files come in parts, each in a thread

        class Counting(ProgressCallback):
            def update(self, size: int) -> None:
                with lock:
                    count(size)

        listed = [
            {"Path": name, "Size": self.files[name].size, "Sha256": self.files[name].sha256}
            for name in files
        ]
        with self.calling():
            return self.api.download_repo(
                self.name,
                "model",
                revision=self.revision,
                file_list=listed,
                progress_callbacks=[Counting],
            )

    def explain(self, error: Exception) -> GLMError | None:
        if isinstance(error, errors.FileDownloadError):
            file, cause = next(iter(error.failed_files.items()))
            if isinstance(cause, errors.FileIntegrityError):
                return self.damaged(file)
            if isinstance(cause, Exception):
                return self.explain(cause)
        if isinstance(error, errors.NotExistError):
            return self.not_found()
        return super().explain(error)
