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
from glm2_jax.choices import FAMILIES
from glm2_jax.errors import CheckpointError
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
from glm2_jax.published import form_of, read_rope
from glm2_jax.text.template import TEMPLATES
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
    """What the small files of a folder hold."""

    path: Path
    raw: Mapping[str, Any]  # config.json
    tokenizer_config: Mapping[str, Any]  # {} without
    named: NamedTokens
    ends: Mapping[int, str]  # ids that end an answer -> the file that says so


def read_side_files(folder: Path, raw: Mapping[str, Any], manifest: Manifest | None) -> SideFiles:
    """Read the small files of a folder; of our own format only what its manifest lists."""

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
    """Return the family of a folder's model, and a line that says what decided.

    The family is None where nothing shows it, the line None where config.json or the user does, who
    said `family`, `rope_kind`, `template`. Signs that contradict each other are a CheckpointError,
    and so is a configuration with the vocabulary of other models. `plain` is None where the folder
    has no vocabulary.
    """
    family = family or side.raw.get("family")
    possible = _possible(side, plain, family)
    if family is not None:
        return family, None
    signs = [
        sign._replace(families=sign.families & possible or sign.families)
        for sign in _signs(side, plain)
    ]
    found = decide_family(signs, str(side.path))
    if found is not None:
        clear = len(possible) == 1 or any(sign.clear for sign in signs)
        return found, None if clear else f"the family is {found}, by {signs[0].text}"
    if len(possible) == 1:  # configuration and vocabulary leave no choice
        return min(possible), None
    suited = possible.intersection(TEMPLATES[template].families) if template else possible
    if len(suited) == 1:
        return min(suited), None
    ratio, kind = read_rope(form_of(side.raw), side.raw)
    scaled = str(rope_kind or kind) if ratio != 1 else ""
    path = side.path.absolute()
    if path.parent.name == "snapshots":  # of a hub's cache, where a folder is named by a commit
        path = path.parent.parent
    dummy = plain is None or plain.adds_dummy_prefix
    for text, found in (  # what counts only where there is no sign
        (f"the rope scaling ({scaled})", {"linear": "chatglm2", "base": "chatglm3"}.get(scaled)),
        ("the tokenizer, which puts no space before a text,", None if dummy else "codegeex2"),
        (f"the folder's name {path.name!r}", named_family(path.name)),
    ):
        if found in possible:
            other = "chatglm2" if found == "chatglm3" else "chatglm3"
            return found, f"the family is {found}, by {text} alone (otherwise: --family {other})"
    return None, None


def _possible(side: SideFiles, plain: Tokenizer | None, family: str | None) -> frozenset[str]:
    """Return the families that a folder's configuration and vocabulary allow, or the given one.

    Those of different models are a CheckpointError, but a family that the kind of config.json
    excludes is left to `GLMConfig.from_hf`.
    """
    form = form_of(side.raw)
    if family in FAMILIES and family not in form.families:
        return frozenset({family})
    shown = frozenset(form.families)
    if family is not None:  # an unknown one is refused later
        shown = frozenset({family} if family in FAMILIES else FAMILIES)
    else:
        shown = shown.intersection(*(sign.families for sign in config_signs(side.raw))) or shown
    if plain is None or (possible := shown.intersection(plain.families)):
        return shown if plain is None else possible
    model = form.name if shown.issuperset(form.families) else f"a {min(shown)} model"
    raise CheckpointError(
        f"The configuration and the tokenizer in {side.path} belong to different models.",
        f"The configuration is that of {model}, the vocabulary one of "
        f"{' or '.join(plain.families) or 'none of this family'}.",
        "Use the tokenizer files of the repository that the weights come from.",
    )


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
            regular_file_size(path)
            with reading(path), path.open("rb") as file:
                text = file.read(_MAX_TEXT).decode("utf-8", errors="replace")
            signs += prompt_signs(text, f"{what} in {name}")
    return [*signs, *_end_signs(side, plain), *config_signs(side.raw)]


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
        if name in ids:
            roles.add(ids[name])
        elif start is not None:
            roles.add(start + order.index(name))
    roles -= {token.id for token in side.named.tokens if token.content not in order}
    signs = []
    for where in dict.fromkeys(side.ends.values()):
        found = sorted(end for end, name in side.ends.items() if name == where and end in roles)
        if found:
            text = f"the end ids {', '.join(map(str, found))} in {where}, which are roles"
            signs.append(Sign(text, WITH_ROLES))
    return signs
