"""From the messages of a chat to what the prompt templates take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infer.serve import tool_calls
from infer.serve.errors import ApiError, unsupported
from infer.serve.schema import Message, Part, Tool

# The words before the tools that the models were trained with, by how they call them. Those of
# GLM-4 are part of its template.
_TOOLS: dict[str | None, str] = {
    "python": "Answer the following questions as best as you can. "
    "You have access to the following tools:",
    "json": "",
}
_SYSTEM = ("system", "developer")
_RESULTS = ("tool", "function")


def text_of(message: Message) -> str:
    """Return the text of a message; ApiError if it has parts of other kinds."""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(map(_part_text, message.content or ()))


def _part_text(part: Part) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "input_text", "output_text", "refusal") or text is None:
        raise unsupported(f"messages.content: {part.type[:50]}", "the model only reads text.")
    return text


def with_roles(
    asked: Sequence[Message], tools: Sequence[Tool], calls: str | None
) -> list[dict[str, Any]]:
    """Return the messages of a template of roles; `calls` is how it writes tool calls."""
    result: list[dict[str, Any]] = []
    if tools:
        described = [tool.function.model_dump(exclude_none=True) for tool in tools]
        result.append({"role": "system", "content": _TOOLS[calls], "tools": described})
    for message in asked:
        text = text_of(message)
        if message.role in _SYSTEM:
            result.append({"role": "system", "content": text})
        elif message.role in _RESULTS:
            result.append({"role": "observation", "content": text})
        else:
            called = message.tool_calls or ()
            if text or not called:
                result.append({"role": message.role, "content": text})
            for call in called:
                written = tool_calls.written(call.function.arguments, calls)
                name = call.function.name
                result.append({"role": "assistant", "metadata": name, "content": written})
    return result


def rounds(
    asked: Sequence[Message], tools: Sequence[Tool]
) -> tuple[str, list[tuple[str, str]], str | None]:
    """Return question, history and system text of messages, for a template of rounds.

    Messages of one role in a row become one. ApiError: the last is not the user's, or there are
    tools.
    """
    if tools or any(
        message.tool_calls or message.role in ("tool", "function") for message in asked
    ):
        raise unsupported(
            "tools", "this model was not trained to call tools; ChatGLM3 and GLM-4 were."
        )
    if asked[-1].role != "user":
        raise ApiError(
            400,
            f"The last message must be of the role user, got {asked[-1].role}.",
            code="invalid_value",
            param="messages",
        )
    system: list[str] = []
    turns: list[tuple[list[str], list[str]]] = [([], [])]
    for message in asked:
        text = text_of(message)
        if message.role in _SYSTEM and turns == [([], [])]:
            system.append(text)
        elif message.role == "assistant":
            turns[-1][1].append(text)
        else:  # later instructions come before the question that follows them
            if turns[-1][1]:
                turns.append(([], []))
            turns[-1][0].append(text)
    joined = [("\n".join(questions), "\n".join(answers)) for questions, answers in turns]
    return joined[-1][0], joined[:-1], "\n".join(system) or None
