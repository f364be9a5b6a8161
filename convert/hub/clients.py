"""The download clients of the hubs behind one interface, and their errors in our form.

Each client keeps its own cache, credentials, mirrors and proxies, and reads them from the
environment as its documentation says (HF_ENDPOINT, HF_HOME, HF_TOKEN; MODELSCOPE_ENDPOINT, ...).
"""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

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


class Client(Protocol):
    """One model on one hub."""

    name: str  # "owner/name"
    source: str  # the value of `--source`
    hub: str  # the hub's name
    endpoint: str  # its URL
    variable: str  # the environment variable that sets the endpoint
    login: str  # what to do to log in
    revision: str  # the branch, tag or commit that was asked for
    commit: str  # the revision that is used, known after `list_files`
    cache: Path  # folder of the hub's cache
    offline: str | None  # the environment variable that forbids the network, if it is set

    # Return the folder of an earlier download, without using the network.
    def cached_folder(self) -> Path | None: ...

    # Return file name -> bytes, and set `commit`.
    def list_files(self) -> dict[str, int]: ...

    # Return how many bytes of a listed file need not be downloaded.
    def bytes_here(self, file: str) -> int: ...

    # Download the listed files that are not in the cache, and return their folder.
    def fetch(self, files: Collection[str], count: Count) -> Path: ...

    # Return our error for one that only this client raises.
    def explain(self, error: Exception) -> GLMError | None: ...


def open_clients(name: str, revision: str | None, source: str | None) -> list[Client]:
    """Return the client of a source; without a source, every client that can be imported."""
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
                f"Install the extra hub, or: pip install {package.replace('_', '-')}",
            ) from error
        clients.append(client(name, revision))
    return clients


@contextmanager
def calling(client: Client) -> Iterator[None]:
    """Keep a client from writing to stderr, and turn its errors into ours.

    Its progress bars, log and warnings are silenced: the caller shows progress, and what they warn
    of (little disk space, a deprecated variable) is checked here or not the user's doing.
    """
    log = logging.getLogger(_PACKAGES[client.source][0])
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except GLMError:
        raise
    except Exception as error:
        explained = client.explain(error) or general_error(error, client)
        if explained is None:
            raise
        raise explained from error
    finally:
        log.setLevel(level)


def general_error(error: Exception, client: Client) -> GLMError | None:
    """Return our error for one that either client may raise; None for a bug."""
    cause = error.__cause__ or error
    why = f"{type(cause).__name__}: {_first_line(cause)}"
    if _status(error) is not None:
        return CheckpointError(f"{client.endpoint} refused the request.", why, _KEPT)
    if is_network_error(error):
        return CheckpointError(
            f"{client.hub} cannot be reached at {client.endpoint}, or the connection broke.",
            why,
            f"Check the network, or name a mirror in {client.variable}. {_KEPT}",
        )
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return InputError(
            f"The download cannot be written: {error.strerror}{where}.",
            fix=f"Free some space, or move the hub's cache. {_KEPT}",
        )
    if isinstance(error, ValueError | TypeError | KeyError):  # a web page instead of JSON
        return CheckpointError(
            f"{client.endpoint} did not answer as {client.hub} does.",
            why,
            f"Check {client.variable}, and whether a proxy or a login page is in between.",
        )
    return None


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


def not_found(client: Client) -> CheckpointError:
    """Return the error for a model that the hub does not have, or does not show."""
    return CheckpointError(
        f"{client.name}, revision {client.revision}, was not found at {client.endpoint}.",
        "The model does not exist, or it is private and you are not logged in.",
        f"Check the name and --revision; for a private model, {client.login}.",
    )


def damaged(file: str, client: Client) -> CheckpointError:
    """Return the error for a file that is not the listed one."""
    return CheckpointError(
        f"{file} arrived damaged from {client.hub}.",
        "Its sha256 or size differs from the repository's listing.",
        "Run the same command again.",
    )
