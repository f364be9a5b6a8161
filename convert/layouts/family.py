"""Finds the family of a folder's model and its tokens, from everything that the folder holds."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.files.manifest import Manifest
from convert.files.shards import read_json
from convert.files.tensor import reading, regular_file_size
from convert.layouts.tokens import (
    TOKENIZER_CONFIG,
    NamedTokens,
    pieces_named_as_special,
    read_tokens,
)
from glm2_jax.family import (
    WITH_ROLES,
    Sign,
    config_signs,
    decide_family,
    named_family,
    prompt_signs,
    token_signs,
    tokenizer_signs,
)
from glm2_jax.text.tokenizer import SPECIAL, Tokenizer

# Files that show how a prompt is written -> what the message calls that.
_PROMPT_FILES = {
    "chat_template.jinja": "the chat template",
    "chat_template.json": "the chat template",
    "tokenization_chatglm.py": "the prompt",
}
_MAX_TEXT = 2**20


@dataclasses.dataclass(frozen=True)
class SideFiles:
    """What the small files of a folder hold.

    Attributes:
        path: the folder.
        raw: its config.json; of the HF-native layout also under the published keys.
        tokenizer_config: its tokenizer_config.json, {} without.
        named: the tokens that its files name.
        ends: ids that end an answer -> the file that says so.
    """

    path: Path
    raw: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    named: NamedTokens
    ends: Mapping[int, str]


def read_side_files(folder: Path, raw: Mapping[str, Any], manifest: Manifest | None) -> SideFiles:
    """Read the small files of a folder; of our own format only what its manifest lists.

    Raises:
        CheckpointError: one of them is damaged.
    """

    def read(name: str) -> Mapping[str, Any]:
        listed = manifest is None or name in manifest.files
        return read_json(folder / name) if listed and (folder / name).exists() else {}

    settings = read(TOKENIZER_CONFIG)
    ends: dict[int, str] = {}
    generation = "generation_config.json"
    for name, values in (("config.json", raw), (generation, read(generation))):
        found = values.get("eos_token_id")
        for number in found if isinstance(found, list) else [found]:
            if type(number) is int and number >= 0:
                ends.setdefault(number, name)
    named = read_tokens(settings, folder if manifest is None else None)
    return SideFiles(folder, raw, settings, named, ends)


def find_family(
    side: SideFiles,
    plain: Tokenizer | None,
    *,
    family: str | None = None,
    rope_kind: str | None = None,
    template: str | None = None,
) -> tuple[str | None, str | None]:
    """Find the family of a folder's model.

    Args:
        side: its files.
        plain: its pieces; None where it has no tokenizer.model.
        family, rope_kind, template: what the user said.

    Returns:
        The family, None where nothing shows it; and a line that says what decided, None where
        config.json or the user says it.

    Raises:
        CheckpointError: the signs contradict each other.
    """
    if family is not None or side.raw.get("family") is not None:
        return family or side.raw["family"], None
    signs = _signs(side, plain)
    found = decide_family(signs, str(side.path))
    if found is not None:
        clear = any(sign.clear for sign in signs)
        return found, None if clear else f"the family is {found}, by {signs[0].text}"
    if template == "chatglm3":
        return template, None
    for text, found in _hints(side, plain, rope_kind):
        if found is not None:
            other = "chatglm2" if found == "chatglm3" else "chatglm3"
            return found, f"the family is {found}, by {text} alone (otherwise: --family {other})"
    return None, None


def _signs(side: SideFiles, plain: Tokenizer | None) -> list[Sign]:
    """Return every sign of a folder, the strongest first."""
    signs = []
    if side.named.where != TOKENIZER_CONFIG:
        signs += token_signs([token.content for token in side.named.tokens], side.named.where)
    signs += tokenizer_signs(side.tokenizer_config)
    signs += token_signs(side.named.without_id, "special_tokens_map.json or added_tokens.json")
    if plain is not None:
        signs += token_signs(pieces_named_as_special(plain), "tokenizer.model")
    for name, what in _PROMPT_FILES.items():
        path = side.path / name
        if path.is_file():
            signs += prompt_signs(_start_of(path), f"{what} in {name}")
    return [*signs, *_end_signs(side, plain), *config_signs(side.raw)]


def _start_of(path: Path) -> str:
    regular_file_size(path)
    with reading(path), path.open("rb") as file:
        return file.read(_MAX_TEXT).decode("utf-8", errors="replace")


def _end_signs(side: SideFiles, plain: Tokenizer | None) -> list[Sign]:
    """Return what the ids that end an answer show: <|user|> and <|observation|> are such ids."""
    order = SPECIAL["chatglm3"]
    ids = {token.content: token.id for token in side.named.tokens}
    if "[gMASK]" in ids:
        start = ids["[gMASK]"] - order.index("[gMASK]")
    else:
        start = None if plain is None else plain.num_pieces
    roles = set()
    for name in ("<|user|>", "<|observation|>"):
        if name in ids or start is not None:
            roles.add(ids[name] if name in ids else start + order.index(name))
    roles -= {token.id for token in side.named.tokens if token.content not in order}
    signs = []
    for where in dict.fromkeys(side.ends.values()):
        found = sorted(end for end, name in side.ends.items() if name == where and end in roles)
        if found:
            text = f"the end ids {', '.join(map(str, found))} in {where}, which are roles"
            signs.append(Sign(text, WITH_ROLES))
    return signs


def _hints(
    side: SideFiles, plain: Tokenizer | None, rope_kind: str | None
) -> list[tuple[str, str | None]]:
    """Return (what, family) of signs that count only where there are no others."""
    kind = rope_kind or side.raw.get("rope_kind")
    kind = str(kind) if side.raw.get("rope_ratio", 1) != 1 else ""
    path = side.path.absolute()
    if path.parent.name == "snapshots":  # of a hub's cache, where a folder is named by a commit
        path = path.parent.parent
    return [
        (f"the rope scaling ({kind})", {"linear": "chatglm2", "base": "chatglm3"}.get(kind)),
        (
            "the tokenizer, which puts no space before a text,",
            "codegeex2" if plain is not None and not plain.adds_dummy_prefix else None,
        ),
        (f"the folder's name {path.name!r}", named_family(path.name)),
    ]
