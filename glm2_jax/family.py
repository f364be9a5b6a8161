"""Finds the family of a model by the signs in its files.

ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4-9B share one architecture and differ in how a prompt is
written and in the ids that end an answer, so a wrong guess shows only in bad answers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from glm2_jax.choices import FAMILIES
from glm2_jax.errors import CheckpointError
from glm2_jax.published import form_of

_NAMES = {
    family: re.compile(pattern, re.IGNORECASE)
    for family, pattern in {
        "chatglm2": r"chatglm[-_]?v?2(?!\d)",
        "chatglm3": r"chatglm[-_]?v?3(?!\d)",
        "codegeex2": r"codegeex[-_]?2(?!\d)",
        # Not the class Glm4ForCausalLM, which is that of 0414; not GLM-4V, GLM-4-Voice, GLM-4.5.
        "glm4": r"glm[-_]?4(?!\d|\.\d|[-_]?v|(for|model)|.*0414)",
        "glm4-0414": r"(?<!chat)glm[-_]?(4(for|model)|4(?![-_]?v|\.).*0414|z1)",
        "chatglm": r"chatglm[-_]?6b(?![a-z0-9])",
        "glm": r"(?<!chat)glm[-_](large|10b|2b|roberta|515m)(?![a-z0-9])",
    }.items()
}
_OF_GLM4 = {"vocab_size": 151552, "norm_eps": 1.5625e-07}  # values that no other family has
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

WITH_ROLES = frozenset({"chatglm3", "glm4", "glm4-0414"})
WITH_ROUNDS = frozenset({"chatglm2", "codegeex2", "chatglm"})
# Families that have one tokenizer, so that its name shows only that it is one of them.
_SHARED = (frozenset({"chatglm2", "codegeex2"}), frozenset({"glm4", "glm4-0414"}))

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
    form = form_of(raw)
    if len(form.families) == 1:
        signs.append(Sign(f"config.json of {form.name}", frozenset(form.families), clear=True))
    if "interleaved_qkv" in raw or "rotary_percent" in raw:
        keys = "interleaved_qkv or rotary_percent in config.json"
        signs.append(Sign(keys, frozenset({"codegeex2"}), clear=True))
    for field, value in _OF_GLM4.items():
        key, _ = form.fields.get(field, ("", None))
        if raw.get(key) == value:
            text = f"{key} {value} in config.json"
            signs.append(Sign(text, frozenset({"glm4", "glm4-0414"}), clear=True))
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
        families = next((names for names in _SHARED if family in names), frozenset({family}))
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
