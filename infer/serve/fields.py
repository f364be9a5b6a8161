"""Fields that are not honoured: harmless ones, those that are refused, and unknown ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glm2_jax.errors import shorten
from glm2_jax.escape import escape_controls
from infer.serve.errors import ApiError, unsupported
from infer.serve.schema import Message

HARMLESS = frozenset({
    "cache_salt", "chat_template_kwargs", "metadata", "parallel_tool_calls", "prediction",
    "priority", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "request_id",
    "return_tokens_as_token_ids", "safety_identifier", "service_tier",
    "spaces_between_special_tokens", "store", "user",
})  # fmt: skip
"""The text does not depend on them here, so they are accepted and ignored."""

_HARMLESS_IN_MESSAGES = frozenset({
    "annotations", "audio", "function_call", "name", "refusal", "tool_call_id",
})  # fmt: skip
_NOT_ENFORCED = "only the `response_format` of /v1/chat/completions is enforced."
_TEMPLATE = "the checkpoint's own prompt template is used."
_OTHER = "it would change the answer. Leave it out."
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "response_format": (({"type": "text"},), _NOT_ENFORCED),
    **{
        name: ((), _NOT_ENFORCED)
        for name in (
            "grammar", "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json",
            "guided_regex", "json_schema", "structured_outputs",
        )
    },
    "functions": (([],), "it was replaced by `tools`."),
    "function_call": (("none", "auto"), "it was replaced by `tool_choice`."),
    "modalities": ((["text"],), "the model writes text."),
    "audio": ((), "the model writes text."),
    "web_search_options": ((), "the server searches nothing."),
    "verbosity": (("medium",), _OTHER),
    "chat_template": ((), _TEMPLATE),
    "add_generation_prompt": ((True,), _TEMPLATE),
    "continue_final_message": ((False,), _TEMPLATE),
    "documents": (([],), _TEMPLATE),
    "add_special_tokens": ((True, False), _TEMPLATE),
    "skip_special_tokens": ((True,), "special tokens have no text."),
    "include_stop_str_in_output": ((False,), "stop strings are not part of an answer."),
    "suffix": (("",), "the model only continues a text."),
    "use_beam_search": ((False,), "beam search is not supported."),
    "length_penalty": ((1,), "beam search is not supported."),
    "early_stopping": ((False,), "beam search is not supported."),
    "prompt_logprobs": ((), "use `echo` and `logprobs` of /v1/completions."),
    "min_p": ((0,), _OTHER),
    "typical_p": ((1,), _OTHER),
    "tfs_z": ((1,), _OTHER),
    "min_tokens": ((0,), _OTHER),
    "bad_words": (([],), _OTHER),
    "allowed_token_ids": ((), _OTHER),
    "truncate_prompt_tokens": ((), "nothing is cut off silently."),
}  # fmt: skip
"""Name -> (values that change nothing, why others are refused); null changes nothing either."""


def check(
    extra: Mapping[str, Any] | None, messages: Sequence[Message] = (), *, strict: bool
) -> dict[str, str]:
    """Return the headers that name the unknown ones of the `extra` fields of a request.

    The members of its `messages` are checked, too.

    ApiError: one would change the text; or, when `strict`, one is unknown.
    """
    unknown = _unknown_in(messages)
    for name, value in (extra or {}).items():
        if name in HARMLESS:
            continue
        if name not in REFUSED:
            unknown.append(name)
        elif value is not None and not _among(value, REFUSED[name][0]):
            raise unsupported(name, REFUSED[name][1])
    if not unknown:
        return {}
    if strict:
        param = escape_controls(unknown[0][:100])
        message = f"Unknown field {shorten(unknown[0])}."
        raise ApiError(400, message, code="unknown_parameter", param=param)
    names = ", ".join(ascii(escape_controls(name[:40]))[1:-1] for name in unknown[:10])
    more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
    return {"X-Warning": f"ignored unknown fields: {names}{more}"}


def _unknown_in(messages: Sequence[Message]) -> list[str]:
    """Return the names of unknown members, each once; ApiError for one that would be lost."""
    found: dict[str, None] = {}
    for message in messages:
        extra = message.model_extra or {}
        if extra.get("function_call") is not None:
            raise unsupported("messages.function_call", "it was replaced by `tool_calls`.")
        found |= dict.fromkeys(extra.keys() - _HARMLESS_IN_MESSAGES)
    return [f"messages.{name}" for name in found]


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Return whether a value is one of these, True and False being no numbers."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
