"""A model by its name on a hub: found in the hub's cache, or fetched where that was asked for.

Nothing touches the network unless a source is named. Only what opening a checkpoint needs is
fetched: configuration, tokenizer and one set of weights; never Python code, of which the published
repositories hold some.
"""

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm2_jax.choices import SOURCES
from glm2_jax.cli.files import refuse_url
from glm2_jax.cli.messages import Progress, human_size, note

if TYPE_CHECKING:
    from convert.hub.clients import Client

_NEEDED = ("config.json", "tokenizer.model")
# The others of these tell the model's family and the ids of its tokens.
_WANTED = (
    "tokenizer_config.json",
    "manifest.json",
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "chat_template.jinja",
)
_NAME = re.compile(r"(?=.{3,193}\Z)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./+-]*")
# Published beside the models that work, and known not to: the beginning of the name, and why.
_OWNERS = ("thudm", "zai-org", "zhipuai")
_REFUSED = {
    "chatglm-6b": "It is the first generation, another architecture.",
    "glm-4": "It has another tokenizer.",
}
_SPARE_BYTES = 2**20  # for the small files' blocks


def find_model(
    path: str | os.PathLike,
    *,
    source: str | None = None,
    revision: str | None = None,
    say: Callable[[str], None] = note,
) -> Path:
    """The folder that a user means: a path, or a model on a hub.

    Args:
        path: a folder, also that of a model in a hub's cache, of which a snapshot is meant; or
            "owner/name", where no such folder exists or a source is given.
        source: one of `SOURCES` to fetch it from there; None = only look, never use the network.
        revision: branch, tag or commit on the hub; None = the newest.
        say: gets a line of text on what is done.

    Raises:
        UsageError: no name of a model or of a revision, a URL, or the hub's client is not
            installed.
        CheckpointError: the model is known not to work; or the hub does not have it, does not give
            it, or cannot be reached; or there is no whole copy of it here.
        InputError: no space on the disk.
    """
    from glm2_jax.errors import CheckpointError, UsageError

    refuse_url(path)
    name = os.fspath(path)
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UsageError(
            f"--revision {revision!r} is no revision.",
            "It is the name of a branch or tag, or a commit.",
            "Leave it out to take the newest.",
        )
    is_name = _NAME.fullmatch(name) is not None
    if source is None and (os.path.exists(name) or not is_name):
        if revision is not None:
            raise UsageError(
                f"--revision {revision} needs a model on a hub.",
                f"{name} is a path; its files are taken as they are.",
                "Leave --revision out.",
            )
        return _snapshot_or_folder(Path(name), say)
    if source is not None and source not in SOURCES:
        raise UsageError(f"unknown source {source!r}.", f"Known: {', '.join(SOURCES)}.")
    if not is_name:
        raise UsageError(
            f"{name!r} is no name of a model on a hub.",
            "Such a name is OWNER/NAME, for example THUDM/chatglm2-6b.",
            "Leave --source out to open a folder.",
        )
    _refuse_known(name)
    from convert.hub.clients import open_clients

    clients = open_clients(name, revision, source)
    if source is not None:
        return _fetch(clients[0], say)
    for client in clients:
        folder = client.cached_folder()
        if folder is not None:
            return _whole(folder, client)
    raise CheckpointError(
        f"There is no folder {name}, and no copy of a model of that name from a hub.",
        "The network is used only when that is asked for.",
        "Check the path; or use --source hf or --source modelscope (source=...) to fetch it.",
    )


def _snapshot_or_folder(folder: Path, say: Callable[[str], None]) -> Path:
    from convert.files.foreign import find_snapshot
    from convert.files.tensor import reading

    with reading(folder):
        snapshot = find_snapshot(folder)
    if snapshot is None:
        return folder
    say(f"{folder} is a hub's cache: reading {snapshot}")
    return snapshot


def _refuse_known(name: str) -> None:
    from glm2_jax.errors import CheckpointError

    owner, _, model = name.lower().partition("/")
    for beginning, reason in _REFUSED.items():
        if owner in _OWNERS and model.startswith(beginning):
            raise CheckpointError(
                f"{name} is not supported.", reason, "Take chatglm2-6b or chatglm3-6b."
            )


def _whole(folder: Path, client: "Client") -> Path:
    """The folder, if nothing of it is missing."""
    from convert.files.shards import read_json
    from glm2_jax.errors import CheckpointError

    names = [entry.name for entry in folder.iterdir() if entry.exists()]  # links that lead nowhere
    try:
        needed_files(names, lambda name: read_json(folder / name))
    except CheckpointError as error:
        raise CheckpointError(
            f"The copy of {client.name} in {folder} is not complete.",
            error.what,
            f"Use --source {client.source} (source={client.source!r}) to fetch the rest.",
        ) from error
    return folder


def _fetch(client: "Client", say: Callable[[str], None]) -> Path:
    from convert.files.shards import read_json
    from glm2_jax.cli.files import require_space

    if client.offline:
        folder = client.cached_folder()
        say(f"{client.offline} is set: {client.hub} is not asked")
        return _whole(folder, client) if folder is not None else _absent(client)
    sizes = client.list_files()

    def read_index(name: str) -> dict[str, Any]:
        return read_json(client.fetch(name, lambda count: None))

    names = needed_files(sizes, read_index)
    missing = {name: sizes[name] - client.bytes_here(name) for name in names}
    total = sum(missing.values())
    say(f"{client.name} from {client.hub}, revision {client.commit}")
    if total:
        all_bytes = sum(sizes[name] for name in names)
        say(f"{human_size(total)} of {human_size(all_bytes)} to fetch into {client.cache}")
    require_space(client.cache / client.name, total + _SPARE_BYTES)
    done = 0
    with Progress("fetching", total, show=human_size) as bar:

        def count(fetched: int) -> None:
            nonlocal done
            done += fetched
            bar(done)

        paths = {name: client.fetch(name, count) for name in names}
    folder = paths["config.json"].parent
    _refuse_leftovers(folder, names)
    return folder


def _refuse_leftovers(folder: Path, fetched: list[str]) -> None:
    """A cache may keep files that a revision of the same name had earlier."""
    from convert.files.shards import choose_weights
    from glm2_jax.errors import CheckpointError

    read = choose_weights([entry.name for entry in folder.iterdir() if entry.is_file()])
    if read not in fetched:
        raise CheckpointError(
            f"{folder / str(read)} does not belong to the revision that was fetched.",
            "It would be read instead of the weights of that revision.",
            "Remove the file.",
        )


def _absent(client: "Client") -> Path:
    from glm2_jax.errors import CheckpointError

    raise CheckpointError(
        f"There is no copy of {client.name} in {client.cache}.",
        f"{client.offline} forbids to ask {client.hub}.",
        "Unset it, or give a folder.",
    )


def needed_files(names: Collection[str], read_index: Callable[[str], dict[str, Any]]) -> list[str]:
    """Which files of a repository are needed to open it.

    Args:
        names: the files that are there.
        read_index: reads one of them, an index of weights, as JSON.

    Returns:
        Configuration, tokenizer, and the set of weights that
        `convert.files.shards.open_weights` reads.

    Raises:
        CheckpointError: something needed is not there, or an index names other than weights.
    """
    from convert.files.shards import WEIGHT_FILES, check_file_name, choose_weights
    from glm2_jax.errors import CheckpointError

    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise CheckpointError(
            f"{' and '.join(missing)} is not there.",
            "A ChatGLM2, ChatGLM3 or CodeGeeX2 checkpoint has it.",
        )
    small = [*_NEEDED, *(name for name in _WANTED if name in names)]
    first = choose_weights(names)
    if first is None:
        raise CheckpointError(f"No weights are there (none of {', '.join(WEIGHT_FILES)}).")
    if not first.endswith(".json"):
        return [*small, first]
    places = read_index(first).get("weight_map")
    shards = list(dict.fromkeys(map(str, places.values()))) if isinstance(places, dict) else []
    for shard in shards:
        check_file_name(Path(first), shard)
    absent = [shard for shard in shards if shard not in names]
    if absent or not shards:
        raise CheckpointError(
            f"{len(absent)} of {len(shards)} files that {first} lists are not there."
        )
    return [*small, first, *shards]
