"""Prompts of messages, each after the id of its role: ChatGLM3 and GLM-4.

The text of a message is encoded by the tokenizer alone, so it never becomes a special id.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glm2_jax.errors import InputError, UsageError
from glm2_jax.text.template import find_template
from glm2_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "observation")
Reply = str | Sequence[Mapping[str, Any]]  # an answer of a history: text, or messages
Turns = tuple[tuple[str, Reply], ...]  # questions and answers, oldest first

# The words that GLM-4 was trained with. Source: the chat template of glm-4-9b-chat.
GLM4_TOOLS = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
GLM4_TOOL = "\n\n## {name}\n\n{json}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"


def build_messages(
    tokenizer: Tokenizer, messages: Sequence[Mapping], template: str = "chatglm3"
) -> list[int]:
    """Build the ids of a prompt of messages, which the model answers as the assistant.

    A message has a "role" (one of ROLES), "content", and optionally "metadata" (one line: the tool
    that an assistant message calls) and, for system, "tools": JSON, for GLM-4 a list of functions.
    Only a final question must not be empty, as in the published code.
    """
    parts = message_ids(tokenizer, messages, template)
    answer = tokenizer.special["<|assistant|>"]
    return [*tokenizer.prefix_ids, *(token for part in parts for token in part), answer]


def message_ids(
    tokenizer: Tokenizer, messages: Sequence[Mapping], template: str
) -> list[list[int]]:
    """Return the ids of each message, which begin with its role; arguments as `build_messages`."""
    if "<|user|>" not in tokenizer.special:
        raise UsageError(
            f"The {template} template needs a tokenizer with role ids.",
            f"The {tokenizer.family} family has none.",
            "Choose another template.",
        )
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError("The messages are not a list.")
    if not messages:
        raise InputError("There are no messages.")
    result = []
    for number, message in enumerate(messages, 1):
        role, metadata, contents = _check_message(message, f"Message {number}", template)
        if number == len(messages) and role in ("user", "system") and not contents[-1].strip():
            raise InputError(f"Message {number} ({role}) is empty.", "There is nothing to answer.")
        # Encoded separately: each gets a dummy prefix, if there is one, as in the published code.
        head = [tokenizer.special[f"<|{role}|>"], *tokenizer.encode(metadata + "\n")]
        texts = map(tokenizer.encode, contents)
        result.append([token for text in texts for token in (*head, *text)])
    return result


def is_reply(value: object) -> bool:
    """Return whether a value can be an answer of a history: text, or a list of messages."""
    if isinstance(value, str):
        return True
    parts = value if isinstance(value, Sequence) else ()
    return len(parts) > 0 and all(isinstance(part, Mapping) for part in parts)


def reply_messages(reply: Reply) -> list[Mapping[str, Any]]:
    """Return the messages of an answer of a history."""
    return [{"role": "assistant", "content": reply}] if isinstance(reply, str) else list(reply)


def _check_message(message: object, where: str, template: str) -> tuple[str, str, list[str]]:
    """Return (role, metadata, contents): tools may be a message before that of the content."""
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is not an object with role and content.")
    unknown = sorted(str(key) for key in message.keys() - {"role", "content", "metadata", "tools"})
    if unknown:
        raise InputError(f"{where} has an unknown key: {', '.join(unknown)}.")
    role, content, metadata = message.get("role"), message.get("content"), message.get("metadata")
    if role not in ROLES:
        raise InputError(f"{where} has the role {role!r}.", f"The roles are {', '.join(ROLES)}.")
    where = f"{where} ({role})"
    if not isinstance(content, str):
        raise InputError(f"{where} has no content string.")
    if metadata is not None and (not isinstance(metadata, str) or "\n" in metadata):
        raise InputError(f"{where} has metadata that is not one line of text.")
    contents = [content]
    if (tools := message.get("tools")) is not None:
        if role != "system":
            raise InputError(f"{where} has tools.", "Only a system message may have them.")
        try:
            if find_template(template).calls == "json":
                contents = [_glm4_tools(tools), *([content] if content else [])]
            else:
                contents = [f"{content}\n{_json(tools)}"]
        except (TypeError, ValueError) as error:
            raise InputError(f"{where} has tools that are not JSON.", str(error)) from error
    return role, metadata or "", contents


def _glm4_tools(tools: Any) -> str:
    """Return the text of functions, given as such or as OpenAI's tools; TypeError for others."""
    if not isinstance(tools, list | tuple):
        raise TypeError("expected a list of functions")
    text = GLM4_TOOLS
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name or "\n" in name:
            raise ValueError("each must be an object whose name is one line of text")
        text += GLM4_TOOL.format(name=name, json=_json(function))
    return text


def _json(value: Any) -> str:
    return json.dumps(value, indent=4, ensure_ascii=False, allow_nan=False)


def parse_history(value: Any) -> Turns:
    """Check that a JSON value is a list of [question, answer] pairs; None is an empty one.

    An answer is text, or a list of objects: messages, which the prompt builder checks.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InputError("the history is not a list of [question, answer] pairs")
    for number, turn in enumerate(value, 1):
        pair = isinstance(turn, list) and len(turn) == 2
        if not pair or not isinstance(turn[0], str) or not is_reply(turn[1]):
            raise InputError(f"turn {number} of the history is not a [question, answer] pair")
    return tuple((question, answer) for question, answer in value)
