"""A model by its name on a hub: found in the hub's cache, or downloaded if that was asked for.

The network is used only if a source is named. Only what opening a checkpoint needs is downloaded:
configuration, tokenizer and one set of weights; never the Python code that the published
repositories contain.
"""

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from convert.hub.clients import Client, open_clients
from glm2_jax.cli.bundled import MODELS, find_bundled
from glm2_jax.cli.files import refuse_url, require_space
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.errors import CheckpointError, UsageError

_CONFIG = "config.json"
# The model's family, the ids of its tokens and how weights are packed are read from these.
_WANTED = (
    "tokenizer_config.json",
    "manifest.json",
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "chat_template.jinja",
    "quantize_config.json",
    "quant_config.json",
)
_NAME = re.compile(r"(?=.{3,193}\Z)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./+-]*")
# Models of the same owners that are not supported: what their names match, and why.
_OWNERS = ("thudm", "zai-org", "zhipuai")
_REFUSED = {
    re.compile(pattern): reason
    for pattern, reason in {
        r"glm-4(\.\d)?v.*": "It reads images; only text is implemented.",
        r"glm-4-voice.*": "It reads and writes speech; only text is implemented.",
        r"glm-(4\.|5).*": "It is a mixture of experts.",
        r"glm-(base|large|2b|10b|515m|roberta-large)": (
            "It has a BERT, RoBERTa or GPT-2 tokenizer; only the Chinese GLM models are supported."
        ),
    }.items()
}
_SPARE_BYTES = 2**20  # for the blocks of the small files


def find_model(
    path: str | os.PathLike, *, source: str | None = None, revision: str | None = None
) -> Path:
    """Return the folder that a user means: a path, a model on a hub, or "demo", the bundled one.

    A path may be that of a model in a hub's cache: its snapshot is taken. "owner/name" is looked
    for in the caches if no such folder exists, and downloaded if a source, "hf" or "modelscope", is
    given; only then the network is used. `revision` is a branch, tag or commit; None = the newest.

    Raises:
        UsageError: not a name of a model or a revision, a URL, or the hub's client is not
            installed.
        CheckpointError: the model is not supported; the hub does not have it, refuses it or cannot
            be reached; or the copy here is not complete.
        InputError: not enough disk space.
    """
    refuse_url(path)
    name = find_bundled(path, MODELS) if source is None else os.fspath(path)
    is_name = _NAME.fullmatch(name) is not None
    is_path = source is None and (os.path.exists(name) or not is_name)
    if revision is not None and (is_path or not _REVISION.fullmatch(revision)):
        path = f"{name} is a path; its files are read as they are."
        raise UsageError(
            f"--revision {revision!r} is not a revision of a model on a hub.",
            path if is_path else "Expected the name of a branch or tag, or a commit.",
            "Leave it out to take what is there, or the newest.",
        )
    if is_path:
        return _snapshot_or_folder(Path(name))
    if not is_name:
        raise UsageError(
            f"{name!r} is not the name of a model on a hub.",
            "Expected OWNER/NAME, for example THUDM/chatglm2-6b.",
            "Leave --source out to open a folder.",
        )
    owner, _, model = name.lower().partition("/")
    for pattern, reason in _REFUSED.items():
        if owner in _OWNERS and pattern.fullmatch(model):
            raise CheckpointError(
                f"{name} is not supported.", reason, "Use glm-4-9b-chat or chatglm3-6b."
            )
    clients = open_clients(name, revision, source)
    if source is not None and clients[0].offline is None:
        return _fetch(clients[0])
    for client in clients:
        found = client.cached("config.json")
        if found is not None:
            return _complete(found.parent, client)
    why = "The network is used only if a source is named."
    fix = "Check the path; or use --source hf or --source modelscope (source=...) to download it."
    if source is not None:
        why = f"{clients[0].offline} is set, so {clients[0].hub} is not asked."
        fix = "Unset it to download the model, or give a folder."
    what = f"Folder {name} not found, and no downloaded model has that name."
    raise CheckpointError(what, why, fix)


def _snapshot_or_folder(folder: Path) -> Path:
    from convert.files.foreign import find_snapshot
    from convert.files.tensor import reading

    with reading(folder):
        snapshot = find_snapshot(folder)
    if snapshot is None:
        return folder
    note(f"{folder} is a hub's cache: reading {snapshot}")
    return snapshot


def _complete(folder: Path, client: Client) -> Path:
    """Return the folder, unless a needed file is missing."""
    from convert.files.shards import read_json

    names = [entry.name for entry in folder.iterdir() if entry.exists()]  # not a broken link
    try:
        needed_files(names, lambda name: read_json(folder / name))
    except CheckpointError as error:
        raise CheckpointError(
            f"The copy of {client.name} in {folder} is not complete.",
            error.what,
            f"Use --source {client.source} (source={client.source!r}) to download the rest.",
        ) from error
    return folder


def _fetch(client: Client) -> Path:
    from convert.files.shards import choose_weights, read_json

    sizes = client.list_files()
    names = needed_files(
        sizes, lambda index: read_json(client.fetch([index], lambda count: None) / index)
    )
    size = sum(sizes[name] for name in names)
    missing = size - sum(client.bytes_here(name) for name in names)
    note(f"{client.name} from {client.hub}, revision {client.commit}")
    if missing:
        note(f"downloading {human_size(missing)} of {human_size(size)} into {client.cache}")
    require_space(client.cache / client.name, missing + _SPARE_BYTES)
    done = 0
    with Progress("downloading", missing, show=human_size) as bar:

        def count(arrived: int) -> None:
            nonlocal done
            done += arrived
            bar(done)

        folder = client.fetch(names, count)
    read = choose_weights([entry.name for entry in folder.iterdir() if entry.is_file()])
    if read not in names:  # a cache may keep files of an earlier state of the revision
        raise CheckpointError(
            f"{folder / str(read)} does not belong to the revision that was downloaded.",
            "It would be read instead of the weights of that revision.",
            "Remove the file.",
        )
    return folder


def needed_files(names: Collection[str], read_index: Callable[[str], dict[str, Any]]) -> list[str]:
    """Return which of a repository's files are needed to open it: configuration, tokenizer, and the
    set of weights that `convert.files.shards.open_weights` reads.

    `read_index` reads one of them, an index of weights, as JSON. A CheckpointError says that a
    needed file is missing, or that an index names files that are not weights.
    """
    from convert.files.shards import WEIGHT_FILES, check_file_name, choose_weights
    from convert.files.vocabulary import FAST, VOCABULARY_FILES

    known = (*VOCABULARY_FILES, FAST)
    vocabulary = [name for name in known if name in names][:1]  # the one that is read
    missing = [] if _CONFIG in names else [_CONFIG]
    missing += [] if vocabulary else [VOCABULARY_FILES[0]]
    if missing:
        raise CheckpointError(
            f"{' and '.join(missing)} not found.",
            f"Every checkpoint has a configuration and a vocabulary ({', '.join(known)}).",
        )
    wanted = (_CONFIG, *vocabulary, *_WANTED)
    small = list(dict.fromkeys(name for name in wanted if name in names))
    first = choose_weights(names)
    if first is None:
        raise CheckpointError(f"No weights found (none of {', '.join(WEIGHT_FILES)}).")
    if not first.endswith(".json"):
        return [*small, first]
    places = read_index(first).get("weight_map")
    shards = list(dict.fromkeys(map(str, places.values()))) if isinstance(places, dict) else []
    for shard in shards:
        check_file_name(Path(first), shard)
    absent = [shard for shard in shards if shard not in names]
    if absent or not shards:
        raise CheckpointError(
            f"{len(absent)} of {len(shards)} files that {first} lists are missing."
        )
    return [*small, first, *shards]
