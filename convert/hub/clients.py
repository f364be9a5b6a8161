"""The download clients of the hubs behind one interface, and their errors in our form.

Each client keeps its own cache, credentials, mirrors and proxies, and reads them from the
environment as its documentation says (HF_ENDPOINT, HF_HOME, HF_TOKEN; MODELSCOPE_ENDPOINT, ...).
"""

import contextlib
import importlib
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from glm2_jax.errors import CheckpointError, GLMError, InputError, UsageError

Count = Callable[[int], None]  # called with the number of bytes that arrived

# --source -> the package of its client, and our module and class that use it.
_PACKAGES = {
    "hf": ("huggingface_hub", "convert.hub.huggingface", "HuggingFace"),
    "modelscope": ("modelscope_hub", "convert.hub.modelscope", "ModelScope"),
}
# huggingface_hub changed its HTTP library twice.
_NETWORK_PACKAGES = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "modelscope_hub")
_KEPT = "Run the same command again: it continues with what has been downloaded."


class Client(ABC):
    """One model on one hub."""

    name: str  # "owner/name"
    source: str  # the value of `--source`
    hub: str  # the hub's name
    endpoint: str  # its URL
    variable: str  # the environment variable that sets the endpoint
    login: str  # what to do to log in
    revision: str  # the branch, tag or commit that was asked for
    commit: str  # the revision that is used, better known after `list_files`
    cache: Path  # folder of the hub's cache
    offline: str | None = None  # the environment variable that forbids the network, if it is set

    @abstractmethod
    def cached(self, file: str) -> Path | None:
        """Return where a file of an earlier download is, without using the network."""

    @abstractmethod
    def list_files(self) -> dict[str, int]:
        """Return file name -> bytes, and set `commit`."""

    @abstractmethod
    def bytes_here(self, file: str) -> int:
        """Return how many bytes of a listed file need not be downloaded."""

    @abstractmethod
    def fetch(self, files: Collection[str], count: Count) -> Path:
        """Download the listed files that are not in the cache, and return their folder."""

    def explain(self, error: Exception) -> GLMError | None:
        """Return our error for one of the client; None for a bug."""
        cause = error.__cause__ or error
        why = f"{type(cause).__name__}: {_first_line(cause)}"
        if _status(error) is not None:
            return CheckpointError(f"{self.endpoint} refused the request.", why, _KEPT)
        if is_network_error(error):
            return CheckpointError(
                f"{self.hub} cannot be reached at {self.endpoint}, or the connection broke.",
                why,
                f"Check the network, or name a mirror in {self.variable}. {_KEPT}",
            )
        if isinstance(error, OSError):
            where = f": {error.filename}" if error.filename else ""
            return InputError(
                f"The download cannot be written: {error.strerror}{where}.",
                fix=f"Free some space, or move the hub's cache. {_KEPT}",
            )
        if isinstance(error, ValueError | TypeError | KeyError):  # a web page instead of JSON
            return CheckpointError(
                f"{self.endpoint} did not answer as {self.hub} does.",
                why,
                f"Check {self.variable}, and whether a proxy or a login page is in between.",
            )
        return None

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Keep the client from writing to stderr, and turn its errors into ours.

        Its progress bars, log and warnings are silenced: the caller shows progress, and what they
        warn of (little disk space, a deprecated variable) is checked here or not the user's doing.
        """
        log = logging.getLogger(_PACKAGES[self.source][0])
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            explained = None if isinstance(error, GLMError) else self.explain(error)
            if explained is None:
                raise
            raise explained from error
        finally:
            log.setLevel(level)

    def not_found(self) -> CheckpointError:
        """Return the error for a model that the hub does not have, or does not show."""
        return CheckpointError(
            f"{self.name}, revision {self.revision}, was not found at {self.endpoint}.",
            "The model does not exist, or it is private and you are not logged in.",
            f"Check the name and --revision; for a private model, {self.login}.",
        )

    def damaged(self, file: str) -> CheckpointError:
        """Return the error for a file that is not the listed one."""
        return CheckpointError(
            f"{file} arrived damaged from {self.hub}.",
            "Its sha256 or size differs from the repository's listing.",
            "Run the same command again.",
        )


def open_clients(name: str, revision: str | None, source: str | None) -> list[Client]:
    """Return the client of a source; without a source, every client that can be imported."""
    if source is not None and source not in _PACKAGES:
        raise UsageError(f"Unknown source {source!r}.", f"Known: {', '.join(_PACKAGES)}.")
    clients = []
    for key in _PACKAGES if source is None else [source]:
        package, module, kind = _PACKAGES[key]
        try:
            client = getattr(importlib.import_module(module), kind)
        except ImportError as error:
            if source is None:
                continue
            raise UsageError(
                f"--source {source} needs the package {package}, which cannot be imported.",
                f"{type(error).__name__}: {_first_line(error)}",
                f"Install it: pip install {package.replace('_', '-')}",
            ) from error
        clients.append(client(name, revision))
    return clients


def is_network_error(error: Exception) -> bool:
    """Return whether trying again may help."""
    status = _status(error)
    if status is not None:
        return status >= 500
    return type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES or (
        # The clients' own errors about connections and short files have no errno.
        isinstance(error, OSError) and (error.errno is None or isinstance(error, ConnectionError))
    )


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", error), "status_code", None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
