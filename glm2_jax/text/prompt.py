"""Prompts as ids: ChatGLM2 rounds, ChatGLM3 role messages, and raw text.

The text of questions and answers is encoded by the tokenizer alone, so it never becomes a special
id.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from glm2_jax.choices import TEMPLATES
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.text.tokenizer import SPACE_MARK, Tokenizer

ROLES = ("system", "user", "assistant", "observation")
Reply = str | Sequence[Mapping[str, Any]]  # an answer of a history: text, or ChatGLM3 messages
Turns = Sequence[Sequence[Any]]  # [question, Reply]


def build_prompt(
    tokenizer: Tokenizer,
    template: str,
    query: str,
    history: Turns = (),
    system: str | None = None,
) -> list[int]:
    """Build the ids of a prompt by one of `choices.TEMPLATES`.

    `query` is the question, `history` are (question, answer) pairs, oldest first. An answer is
    text; with "chatglm3" it may be a list of messages, as `build_messages` takes them. ChatGLM2 has
    no place for `system` instructions: they precede the first question.
    """
    _check_turns(query, history, system)
    if template == "chatglm2":
        return tokenizer.prefix_ids + tokenizer.encode(chatglm2_text(query, history, system))
    if template == "chatglm3":
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        for question, answer in history:
            messages += [{"role": "user", "content": question}, *reply_messages(answer)]
        return build_messages(tokenizer, [*messages, {"role": "user", "content": query}])
    if template == "raw":
        if history or system:
            raise InputError(
                "The raw template takes neither history nor a system text.",
                "It passes the text to the model as it is.",
                "Write everything into the prompt, or choose another template.",
            )
        return tokenizer.prefix_ids + tokenizer.encode(query)
    raise UsageError(f"unknown template {template!r}", fix=f"Known: {', '.join(TEMPLATES)}.")


def chatglm2_text(query: str, history: Turns = (), system: str | None = None) -> str:
    """Return the text of a ChatGLM2 prompt; InputError if an answer is a list of messages."""
    questions = [question for question, _ in history] + [query]
    if system:
        questions[0] = f"{system}\n{questions[0]}"
    for number, (_, answer) in enumerate(history, 1):
        if not isinstance(answer, str):
            raise InputError(
                f"The answer in turn {number} of the history is a list of messages.",
                "Only the chatglm3 template supports them.",
                "Write the answer as text.",
            )
    answers = [f"{answer}\n\n" for _, answer in history] + [""]
    return "".join(
        f"[Round {number}]\n\n问：{question}\n\n答：{answer}"
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True), 1)
    )


def build_followup(tokenizer: Tokenizer, query: str, round_number: int) -> list[int]:
    """Build the ids that continue a ChatGLM2 conversation whose last answer is in the cache.

    They are exactly the end of the full prompt's ids: a newline is a byte piece, which never
    merges, so only the dummy prefix has to go. If a tokenizer merges newlines, so that no such
    suffix exists, it raises CheckpointError. `round_number` is 2 or more.
    """
    _check_turns(query, (), None)
    ids = tokenizer.encode(f"\n\n[Round {round_number}]\n\n问：{query}\n\n答：")
    if tokenizer.adds_dummy_prefix and tokenizer.piece(ids[0]) == SPACE_MARK:
        ids = ids[1:]
    if [tokenizer.byte_value(i) for i in ids[:2]] != [10, 10]:
        raise CheckpointError(
            "This tokenizer cannot continue a conversation piecewise.",
            "It has pieces that contain a newline, so text is split differently at the seam.",
            "Build the complete prompt for every question.",
        )
    return ids


def build_messages(tokenizer: Tokenizer, messages: Sequence[Mapping]) -> list[int]:
    """Build the ids of a ChatGLM3 prompt, which the model answers as the assistant.

    A message has a "role" (one of ROLES), "content", and optionally "metadata" (one line: the tool
    that an assistant message calls) and, for system, "tools" (JSON). Only a final question must not
    be empty, as in the published code.
    """
    if "<|user|>" not in tokenizer.special:
        raise UsageError(
            "The chatglm3 template needs a ChatGLM3 tokenizer.",
            f"The {tokenizer.family} family has no role ids.",
            "Choose another template.",
        )
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError("The messages are not a list.")
    if not messages:
        raise InputError("There are no messages.")
    ids = list(tokenizer.prefix_ids)
    for number, message in enumerate(messages, 1):
        role, metadata, content = _check_message(message, f"Message {number}")
        if number == len(messages) and role in ("user", "system") and not content.strip():
            raise InputError(f"Message {number} ({role}) is empty.", "There is nothing to answer.")
        # Encoded separately: each gets a dummy prefix, as in the published code.
        ids += [tokenizer.special[f"<|{role}|>"]]
        ids += tokenizer.encode(metadata + "\n") + tokenizer.encode(content)
    return ids + [tokenizer.special["<|assistant|>"]]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer: end token, roles that follow it, those of the folder."""
    followers = ("<|user|>", "<|observation|>")
    roles = [tokenizer.special[name] for name in followers if name in tokenizer.special]
    return tuple(dict.fromkeys((tokenizer.eos_id, *roles, *tokenizer.end_ids)))


def truncate_prompt(
    tokenizer: Tokenizer,
    template: str,
    query: str,
    history: Turns,
    system: str | None,
    limit: int,
) -> tuple[list[int], int, int]:
    """Build a prompt of at most `limit` ids: (ids, number of omitted turns, of question tokens).

    The oldest turns go first, then the end of the question, in whole characters. The frame around
    the question and the system text are never cut. InputError if not even one character fits.
    """

    def build(turns: int, characters: int) -> list[int]:
        kept = history[len(history) - turns :]
        return build_prompt(tokenizer, template, query[:characters], kept, system)

    def too_long(turns: int, characters: int) -> bool:
        return len(build(turns, characters)) > limit

    turns, length = len(history), len(query)
    ids = build(turns, length)
    if len(ids) <= limit:
        return ids, 0, 0
    kept = bisect_left(range(turns), True, key=lambda n: too_long(n, length)) - 1
    if kept >= 0:
        return build(kept, length), turns - kept, 0
    shortest = length - len(query.lstrip()) + 1  # a blank question is not allowed
    if too_long(0, shortest):
        raise InputError(
            f"The prompt does not fit into {limit} tokens.",
            f"With a single character of the question it takes {len(build(0, shortest))}.",
            "Allow more tokens"
            + (", or shorten the system text, which is never cut." if system else "."),
        )
    longer = range(shortest + 1, length + 1)
    ids = build(0, shortest + bisect_left(longer, True, key=lambda n: too_long(0, n)))
    return ids, turns, len(build(0, length)) - len(ids)


def is_reply(value: object) -> bool:
    """Return whether a value can be an answer of a history: text, or a list of messages."""
    if isinstance(value, str):
        return True
    parts = value if isinstance(value, Sequence) else ()
    return len(parts) > 0 and all(isinstance(part, Mapping) for part in parts)


def reply_messages(reply: Reply) -> list[Mapping[str, Any]]:
    """Return the messages of an answer of a history."""
    return [{"role": "assistant", "content": reply}] if isinstance(reply, str) else list(reply)


def _check_turns(query: object, history: object, system: object) -> None:
    for name, text in (("prompt", query), ("system text", "" if system is None else system)):
        if not isinstance(text, str):
            raise InputError(
                f"The {name} is not a string.", f"It is of type {type(text).__name__}."
            )
    if not str(query).strip():
        raise InputError("empty prompt", "There is nothing to answer.", "Write a question.")
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise InputError("The history is not a list of [question, answer] pairs.")
    for number, turn in enumerate(history, 1):
        pair = isinstance(turn, Sequence) and not isinstance(turn, str) and len(turn) == 2
        if not pair or not isinstance(turn[0], str) or not is_reply(turn[1]):
            raise InputError(f"Turn {number} of the history is not a [question, answer] pair.")


def _check_message(message: object, where: str) -> tuple[str, str, str]:
    """Return (role, metadata, content), with the tools in the content."""
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
    if (tools := message.get("tools")) is not None:
        if role != "system":
            raise InputError(f"{where} has tools.", "Only a system message may have them.")
        try:
            content += "\n" + json.dumps(tools, indent=4, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where} has tools that are not JSON.", str(error)) from error
    return role, metadata or "", content
