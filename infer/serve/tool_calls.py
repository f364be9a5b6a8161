"""Tool calls: JSON (GLM-4), or code such as `tool_call(city='Beijing')` (ChatGLM3).

The code is never run: it is parsed, and only literals count as arguments.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from infer.engine.answer import Completion, Message
from infer.serve.errors import ApiError, unsupported
from infer.serve.schema import NamedTool, Tool

_FENCE = re.compile(r"```(?:python)?[ \t]*\n(.*?)\n?```", re.DOTALL)
_OPENING = "```python\ntool_call("
_MAX_CODE = 100_000  # characters


def written(arguments: str, calls: str | None) -> str:
    """Return the JSON arguments of a call as the model writes it, see `Template.calls`."""
    try:
        values = json.loads(arguments or "{}")
        json.dumps(values, allow_nan=False)  # Python reads NaN, and 1e999 as infinity
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ApiError(
            400,
            "The arguments of a tool call must be a JSON object with finite numbers, as text.",
            code="invalid_value",
            param="messages.tool_calls.function.arguments",
        )
    return _STYLES[calls].write(values)


def _as_code(values: Mapping[str, Any]) -> str:
    if all(name.isidentifier() and not keyword.iskeyword(name) for name in values):
        inside = ", ".join(f"{name}={value!r}" for name, value in values.items())
    else:
        inside = f"**{values!r}"
    return f"{_OPENING}{inside})\n```"


def _as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False)


def _of_json(text: str) -> dict[str, Any] | None:
    """Return the arguments that a message consists of; None if it is no JSON object."""
    try:
        values = json.loads(text) if len(text) <= _MAX_CODE else None
        _check_json(values)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _of_code(code: str) -> dict[str, Any] | None:
    """Return the arguments of the call in a message; None if it is no call with literals."""
    found = _FENCE.search(code)
    source = (found[1] if found else code).strip()
    if len(source) > _MAX_CODE:
        return None
    try:
        call = ast.parse(source, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        values: dict[str, Any] = {}
        for argument in call.keywords:
            value = ast.literal_eval(argument.value)
            values |= value if argument.arg is None else {argument.arg: value}
        _check_json(values)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return values if all(isinstance(name, str) for name in values) else None


def _check_json(value: Any) -> None:
    """Raise ValueError or TypeError for what JSON in UTF-8 cannot express."""
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


class _Style(NamedTuple):
    """How a model writes the calls of tools."""

    opening: str  # what can be said of a call before its arguments are known
    is_json: bool  # whether the arguments follow it as JSON, which a schema can bind
    write: Callable[[Mapping[str, Any]], str]
    read: Callable[[str], dict[str, Any] | None]


_STYLES = {
    "python": _Style(_OPENING, False, _as_code, _of_code),
    "json": _Style("", True, _as_json, _of_json),
    None: _Style("", False, _as_json, lambda text: None),  # of a model that calls no tools
}
"""By `glm2_jax.text.template.Template.calls`."""


def required(choice: str | NamedTool | None, tools: Sequence[Tool]) -> str | None:
    """Return the tool that a `tool_choice` demands, None = the model decides."""
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool):
        if choice.function.name in names:
            return choice.function.name
        raise ApiError(
            400,
            "`tool_choice` names none of the `tools`.",
            code="invalid_value",
            param="tool_choice",
        )
    if choice != "required":
        return None
    if len(names) != 1:
        raise unsupported("tool_choice", "required needs exactly one tool. Name one, or use auto.")
    return names[0]


def beginning(name: str, calls: str | None) -> tuple[str, ...]:
    """Return how an answer begins that calls a tool: the line of metadata, and the opening."""
    opening = _STYLES[calls].opening
    return (f"{name}\n", opening) if opening else (f"{name}\n",)


def schema_of(called: str, tools: Sequence[Tool], calls: str | None) -> Mapping[str, Any] | None:
    """Return the schema of the arguments of the tool `called`; None where no schema can bind what
    the model writes."""
    if not _STYLES[calls].is_json:
        return None
    (tool,) = (tool for tool in tools if tool.function.name == called)
    return {**(tool.function.parameters or {}), "type": "object"}


def read(
    completion: Completion, calls: str | None, called: str | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """Return the text of an answer without its tool calls, and the calls as OpenAI has them.

    `calls` is how the model writes them, see `Template.calls`.
    The answer continues the `beginning` of a call of the tool `called`, if one is given. If such a
    call was cut off, its arguments are what the model wrote of them.
    """
    texts, found, messages, style = [], [], completion.messages, _STYLES[calls]
    if called is not None:
        messages = (Message("assistant", called, style.opening + completion.text),)
    for message in messages:
        arguments = style.read(message.content) if _may_call(message) else None
        if arguments is not None:
            text = json.dumps(arguments, ensure_ascii=False)
        elif called is not None and cut_off(completion):
            text = completion.text
        else:
            texts.append(message.text if called is None else completion.text)
            continue
        function = {"name": message.metadata, "arguments": text}
        found.append(
            {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        )
    return "\n".join(texts), found


def cut_off(completion: Completion) -> bool:
    """Return whether the model would have written more."""
    return completion.finish_reason in ("length", "loop")


def deltas(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return calls as a stream sends them: id and name first, then the arguments."""
    result = []
    for index, call in enumerate(calls):
        function = call["function"]
        result.append({**call, "index": index, "function": {**function, "arguments": ""}})
        result.append({"index": index, "function": {"arguments": function["arguments"]}})
    return result


def _may_call(message: Message) -> bool:
    return message.role == "assistant" and bool(message.metadata)
