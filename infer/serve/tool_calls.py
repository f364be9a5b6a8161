"""Tool calls of ChatGLM3: code such as `tool_call(city='Beijing')`, which is never run.

It is parsed, and only literals count as arguments.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import secrets
from collections.abc import Sequence
from typing import Any

from infer.engine.answer import Completion, Message
from infer.serve.errors import ApiError, unsupported
from infer.serve.schema import NamedTool, Tool

_FENCE = re.compile(r"```(?:python)?[ \t]*\n(.*?)\n?```", re.DOTALL)
_OPENING = "```python\ntool_call("
_MAX_CODE = 100_000  # characters


def as_code(arguments: str) -> str:
    """Return the JSON arguments of a call as the code that the model writes for it."""
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
    if all(name.isidentifier() and not keyword.iskeyword(name) for name in values):
        inside = ", ".join(f"{name}={value!r}" for name, value in values.items())
    else:
        inside = f"**{values!r}"
    return f"{_OPENING}{inside})\n```"


def arguments_of(code: str) -> dict[str, Any] | None:
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
        json.dumps(values, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return values if all(isinstance(name, str) for name in values) else None


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


def beginning(name: str) -> tuple[str, str]:
    """Return how an answer begins that calls a tool: the line of metadata, and the code."""
    return f"{name}\n", _OPENING


def read(completion: Completion, called: str | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Return the text of an answer without its tool calls, and the calls as OpenAI has them.

    The answer continues the `beginning` of a call of the tool `called`, if one is given. If such a
    call was cut off, it is neither a call nor text.
    """
    texts, calls, messages = [], [], completion.messages
    if called is not None:
        messages = (Message("assistant", called, _OPENING + completion.text),)
    for message in messages:
        arguments = arguments_of(message.content) if _may_call(message) else None
        if arguments is None:
            written = "" if completion.finish_reason in ("length", "loop") else completion.text
            texts.append(message.text if called is None else written)
            continue
        text = json.dumps(arguments, ensure_ascii=False)
        function = {"name": message.metadata, "arguments": text}
        calls.append(
            {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        )
    return "\n".join(texts), calls


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
