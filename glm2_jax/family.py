"""Finds the family of a model by the signs in its files.

The families share one architecture and differ in how a prompt is written and in the ids that end an
answer, so a wrong guess shows only in bad answers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from glm2_jax.choices import FAMILIES
from glm2_jax.errors import CheckpointError

_NAMES = {
    "chatglm2": re.compile(r"chatglm[-_]?v?2(?!\d)", re.IGNORECASE),
    "chatglm3": re.compile(r"chatglm[-_]?v?3(?!\d)", re.IGNORECASE),
    "codegeex2": re.compile(r"codegeex[-_]?2(?!\d)", re.IGNORECASE),
}
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

WITH_ROLES = frozenset({"chatglm3"})
WITH_ROUNDS = frozenset({"chatglm2", "codegeex2"})  # CodeGeeX2 has the tokenizer of ChatGLM2

# "<|user|>", and "<|" + message["role"] + "|>" in the ways in which Jinja writes it.
_ROLES = re.compile(
    "|".join(map(re.escape, ROLE_TOKENS)) + r"|<\|[^<>]{0,80}\brole\b[^<>]{0,80}\|>"
)


class Sign(NamedTuple):
    """Something in a checkpoint that shows its family."""

    text: str  # what and where, for people
    families: frozenset[str]  # those that it allows
    clear: bool = False  # a reader of config.json sees it at once: it need not be reported


def decide_family(signs: Sequence[Sign], source: str = "The checkpoint") -> str | None:
    """Return the first family that all signs allow (none: CheckpointError); None without signs."""
    allowed = frozenset(FAMILIES).intersection(*(sign.families for sign in signs))
    if not allowed:
        named = sorted(set().union(*(sign.families for sign in signs)))
        said = [f"{sign.text}: {' or '.join(sorted(sign.families))}" for sign in signs]
        raise CheckpointError(
            f"{source} matches more than one model family.",
            "; ".join(dict.fromkeys(said)) + ".",
            f"Choose with {' or '.join(f'--family {name}' for name in named)}.",
        )
    return next(family for family in FAMILIES if family in allowed) if signs else None


def named_family(name: Any) -> str | None:
    """Return the family that a name, a path or a class name contains.

    The last part of a path counts first. None where no part names one, or one part names several.
    """
    if not isinstance(name, str):
        return None
    for part in reversed(PurePath(name.replace("\\", "/")).parts):
        found = [family for family, pattern in _NAMES.items() if pattern.search(part)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def config_signs(raw: Mapping[str, Any]) -> list[Sign]:
    """Return the signs in a parsed `config.json`, the strongest first."""
    signs = []
    if "interleaved_qkv" in raw or "rotary_percent" in raw:
        keys = "interleaved_qkv or rotary_percent in config.json"
        signs.append(Sign(keys, frozenset({"codegeex2"}), clear=True))
    for text, family in _named(raw, ("_name_or_path", "architectures", "auto_map")):
        signs.append(Sign(f"{text} in config.json", frozenset({family}), clear=True))
    return signs


def tokenizer_signs(tokenizer_config: Mapping[str, Any]) -> list[Sign]:
    """Return the signs in a parsed `tokenizer_config.json`: its roles first, names last."""
    where = "tokenizer_config.json"
    added = tokenizer_config.get("added_tokens_decoder")
    tokens = _texts(list(added.values()) if isinstance(added, Mapping) else None)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens += _texts(tokenizer_config.get(key))
    signs = token_signs(tokens, where)
    for text in _texts(tokenizer_config.get("chat_template"), "template"):
        signs += prompt_signs(text, f"the chat template in {where}")
    for text, family in _named(tokenizer_config, ("name_or_path", "tokenizer_class", "auto_map")):
        families = WITH_ROUNDS if family == "chatglm2" else frozenset({family})
        signs.append(Sign(f"{text} in {where}", families))
    return signs


def token_signs(tokens: Iterable[str], where: str) -> list[Sign]:
    """Return what the names of a tokenizer's tokens show."""
    roles = [name for name in ROLE_TOKENS if name in set(tokens)]
    return [Sign(f"role tokens ({', '.join(roles)}) in {where}", WITH_ROLES)] if roles else []


def prompt_signs(text: str, what: str) -> list[Sign]:
    """Return what a chat template or code (which is not run) shows; nothing if of both kinds."""
    roles, rounds = _ROLES.search(text) is not None, "[Round " in text
    if roles == rounds:
        return []
    kind, families = ("roles", WITH_ROLES) if roles else ("rounds", WITH_ROUNDS)
    return [Sign(f"{what} ({kind})", families)]


def _named(raw: Mapping[str, Any], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Return (what it is, family) for every family that the values of `keys` name."""
    texts = [(key, name) for key in keys for name in _texts(raw.get(key))]
    found = [(f"{key} {name[:100]!r}", named_family(name)) for key, name in texts]
    return [(text, family) for text, family in found if family is not None]


def _texts(value: Any, key: str = "content") -> list[str]:
    """Return all texts in a value: itself, or those of its items; of an object those of `key`."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return _texts(value[key]) if key in value else _texts(list(value.values()), key)
    if isinstance(value, list):
        return [text for item in value for text in _texts(item, key)]
    return []
