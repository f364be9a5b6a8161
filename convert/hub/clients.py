"""The hubs' own clients behind one face: where a file is, fetch it, and what went wrong.

Each client keeps its own cache, credentials, mirrors and proxies, and reads them from the
environment as its documentation says (HF_ENDPOINT, HF_HOME, HF_TOKEN; MODELSCOPE_ENDPOINT, ...).
"""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from glm2_jax.errors import CheckpointError, GLMError, InputError, UsageError

Count = Callable[[int], None]

# --source -> the package of its client, and our module and class that use it.
_PACKAGES = {
    "hf": ("huggingface_hub", "convert.hub.huggingface", "HuggingFace"),
    "modelscope": ("modelscope_hub", "convert.hub.modelscope", "ModelScope"),
}
_KEPT = "What has been fetched is kept: the same command goes on from there."


class Client(Protocol):
    """One model on one hub.

    Attributes:
        name: "owner/name".
        source: the value of `--source`.
        hub: what people call the hub.
        commit: the revision that is used, known after `list_files`.
        cache: folder of the hub's cache.
        offline: name of the variable that forbids the network, if it is set.
    """

    name: str
    source: str
    hub: str
    commit: str
    cache: Path
    offline: str | None

    def cached_folder(self) -> Path | None:
        """The folder of an earlier download; never uses the network."""
        ...

    def list_files(self) -> dict[str, int]:
        """File name -> bytes, and sets `commit`."""
        ...

    def bytes_here(self, file: str) -> int:
        """How much of a listed file is there already."""
        ...

    def fetch(self, file: str, count: Count) -> Path:
        """Makes sure that a listed file is there; `count` gets the number of new bytes."""
        ...


def open_clients(name: str, revision: str | None, source: str | None) -> list[Client]:
    """The client of a source; without one, every client that is installed.

    Raises:
        UsageError: the client is not installed, or it is damaged.
    """
    clients = []
    for key in _PACKAGES if source is None else [source]:
        package, module, kind = _PACKAGES[key]
        try:
            importlib.import_module(package)
            client = getattr(importlib.import_module(module), kind)
        except ImportError as error:
            if error.name != package or not isinstance(error, ModuleNotFoundError):
                raise UsageError(
                    f"The package {package} cannot be imported.",
                    f"{type(error).__name__}: {first_line(error)}",
                    f"Install it anew: pip install --force-reinstall {_project(package)}",
                ) from error
            if source is not None:
                raise UsageError(
                    f"--source {source} needs the package {package}, which is not installed.",
                    fix=f"Install the extra hub, or: pip install {_project(package)}",
                ) from error
            continue
        clients.append(client(name, revision))
    return clients


def _project(package: str) -> str:
    """What pip calls it."""
    return package.replace("_", "-")


@contextmanager
def explaining(explain: Callable[[Exception], GLMError | None]) -> Iterator[None]:
    """Errors of a client become ours; those that nobody expected stay what they are. What it
    warns of (little space, a deprecated variable) is checked here, or none of the user's doing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except GLMError:
        raise
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        raise explained from error


def general_error(error: Exception, endpoint: str, hub: str, variable: str) -> GLMError | None:
    """What went wrong, where the client has no error of its own for it; None for a bug."""
    if is_network_error(error):
        return unreachable(error, endpoint, hub, variable)
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        return InputError(
            f"What was fetched cannot be written: {error.strerror}{where}.",
            fix=f"Free some space, or move the hub's cache. {_KEPT}",
        )
    if isinstance(error, ValueError | TypeError | KeyError):  # a web page instead of JSON
        return CheckpointError(
            f"{endpoint} does not answer as {hub} does.",
            f"{type(error).__name__}: {first_line(error)}",
            f"Check {variable}, and whether a proxy or a login page is in between.",
        )
    return None


def is_network_error(error: Exception) -> bool:
    """Whether trying again may help; by module, since the client changed its HTTP library twice."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500
    module = type(error).__module__.partition(".")[0]
    if module in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
        return True
    # The client's own errors on connections, and on files that came too short, have no errno.
    return isinstance(error, OSError) and (
        error.errno is None or isinstance(error, ConnectionError)
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def unreachable(error: Exception, endpoint: str, hub: str, variable: str) -> CheckpointError:
    """No connection, or one that broke."""
    cause = error.__cause__ or error
    return CheckpointError(
        f"{hub} cannot be reached at {endpoint}, or the connection broke.",
        f"{type(cause).__name__}: {first_line(cause)}",
        f"Check the network, or name a mirror in {variable}. {_KEPT}",
    )


def no_such_model(
    name: str, endpoint: str, login: str, revision: str | None = None
) -> CheckpointError:
    """The hub does not have it, or does not show it."""
    return CheckpointError(
        f"There is no model {name}{f' of revision {revision}' if revision else ''} at {endpoint}.",
        "Or it is private, and nobody is logged in who may see it.",
        f"Check the name; for a private one use {login}.",
    )


def refused(endpoint: str, answer: object) -> CheckpointError:
    """The hub answered with an error."""
    return CheckpointError(
        f"{endpoint} refused the request.", f"It answered: {answer}.", f"Try again later. {_KEPT}"
    )


def damaged(file: str, hub: str) -> CheckpointError:
    """The bytes are not those that the hub lists."""
    return CheckpointError(
        f"{file} came damaged from {hub}.",
        "Its sha256 or size is not the one that the repository lists.",
        "Run the same command again.",
    )
