"""Finds the family of a model by signs in its files.

The three families have one architecture and differ only in the prompt format and in the ids that
end an answer, so a wrong guess shows only in bad answers.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from glm2_jax.choices import FAMILIES
from glm2_jax.errors import CheckpointError

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

_CHATGLM3 = frozenset({"chatglm3"})
_NOT_CHATGLM3 = frozenset({"chatglm2", "codegeex2"})  # CodeGeeX2 has the tokenizer of ChatGLM2
_NAME = re.compile(r"chatglm[-_]?v?([23])(?!\d)|codegeex[-_]?2(?!\d)", re.IGNORECASE)
# "<|user|>", and "<|" + message["role"] + "|>" in the ways in which Jinja writes it.
_ROLES_IN_TEMPLATE = re.compile(
    "|".join(map(re.escape, ROLE_TOKENS)) + r"|<\|[^<>]{0,80}\brole\b[^<>]{0,80}\|>"
)


@dataclasses.dataclass(frozen=True)
class Sign:
    """Something in a checkpoint that shows its family.

    Attributes:
        text: what it is and where, for messages.
        families: the families that it allows.
        clear: whether it is obvious in config.json, so that it need not be reported.
    """

    text: str
    families: frozenset[str]
    clear: bool = False


def decide_family(signs: Sequence[Sign], source: str = "The checkpoint") -> str | None:
    """Return the one family that all signs allow; None without signs.

    Raises:
        CheckpointError: the signs contradict each other.
    """
    allowed = frozenset(FAMILIES).intersection(*(sign.families for sign in signs))
    if not allowed:
        named = sorted(set().union(*(sign.families for sign in signs)))
        said = [f"{sign.text}: {' or '.join(sorted(sign.families))}" for sign in signs]
        raise CheckpointError(
            f"{source} carries contradicting signs of its model family.",
            "; ".join(dict.fromkeys(said)) + ".",
            f"Choose with {' or '.join(f'--family {name}' for name in named)}.",
        )
    return min(allowed) if signs else None


def named_family(name: Any) -> str | None:
    """Return the family in a name, path or class name, from the last part of the path to the first.

    None if there is none, or more than one in the same part.
    """
    if not isinstance(name, str):
        return None
    for part in reversed(PurePath(name.replace("\\", "/")).parts):
        found = {f"chatglm{glm}" if glm else "codegeex2" for glm in _NAME.findall(part)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def config_signs(raw: Mapping[str, Any]) -> list[Sign]:
    """Return the signs in a parsed `config.json`, the strongest first."""
    signs = []
    if "interleaved_qkv" in raw or "rotary_percent" in raw:
        keys = "interleaved_qkv or rotary_percent in config.json"
        signs.append(Sign(keys, frozenset({"codegeex2"}), clear=True))
    for key in ("_name_or_path", "architectures", "auto_map"):
        for name in _texts(raw.get(key)):
            family = named_family(name)
            if family is not None:
                text = f"{key} {name[:100]!r} in config.json"
                signs.append(Sign(text, frozenset({family}), clear=True))
    return signs


def tokenizer_signs(tokenizer_config: Mapping[str, Any]) -> list[Sign]:
    """Return the signs in a parsed `tokenizer_config.json`: roles first, names last."""
    where = "tokenizer_config.json"
    added = tokenizer_config.get("added_tokens_decoder")
    tokens = _texts(list(added.values()) if isinstance(added, Mapping) else None)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens += _texts(tokenizer_config.get(key))
    signs = [*token_signs(tokens, where)]
    for text in _texts(tokenizer_config.get("chat_template"), "template"):
        signs += template_signs(text, where)
    for key in ("name_or_path", "tokenizer_class", "auto_map"):
        for name in _texts(tokenizer_config.get(key)):
            family = named_family(name)
            if family is not None:
                families = _NOT_CHATGLM3 if family == "chatglm2" else frozenset({family})
                signs.append(Sign(f"{key} {name[:100]!r} in {where}", families))
    return signs


def token_signs(tokens: Iterable[str], where: str) -> list[Sign]:
    """Return the sign in the names of a tokenizer's tokens."""
    roles = [name for name in ROLE_TOKENS if name in set(tokens)]
    return [Sign(f"role tokens ({', '.join(roles)}) in {where}", _CHATGLM3)] if roles else []


def template_signs(template: str, where: str) -> list[Sign]:
    """Return the sign in a chat template; none if it has neither roles nor rounds, or both."""
    roles = _ROLES_IN_TEMPLATE.search(template) is not None
    rounds = "[Round " in template
    if roles == rounds:
        return []
    what = "roles" if roles else "rounds"
    return [Sign(f"the chat template in {where} ({what})", _CHATGLM3 if roles else _NOT_CHATGLM3)]


def code_signs(code: str, where: str) -> list[Sign]:
    """Return the sign in the tokenizer's published Python code, which is not run."""
    if all(f'"{name}"' in code or f"'{name}'" in code for name in ROLE_TOKENS):
        return [Sign(f"the role tokens in {where}", _CHATGLM3)]
    if "[Round " in code and "<|user|>" not in code:
        return [Sign(f"the prompt in {where} (rounds)", _NOT_CHATGLM3)]
    return []


def end_signs(ends: Iterable[int], roles: Iterable[int], where: str) -> list[Sign]:
    """Return the sign in the ids that end an answer, given those of the role tokens."""
    found = sorted(set(ends) & set(roles))
    text = f"the end ids {', '.join(map(str, found))} in {where}, which are roles"
    return [Sign(text, _CHATGLM3)] if found else []


def _texts(value: Any, key: str = "content") -> list[str]:
    """Return all texts in a value: itself, or of its items; of an object its `key`, or all."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return _texts(value[key]) if key in value else _texts(list(value.values()), key)
    if isinstance(value, list):
        return [text for item in value for text in _texts(item, key)]
    return []
