"""Conversations as token sequences, exactly as the model sees them when it answers.

ChatGLM3 keeps a conversation as it is, so a whole one is a sequence in which every answer is
learned, with the id behind it: that is what ends an answer. ChatGLM2 and raw text are written anew
for every question, and an answer of the past is split into other pieces than when it was given, and
has no end token. So there every answer is a sequence of its own, behind the prompt it answers.
"""

from __future__ import annotations

from collections.abc import Sequence

from glm2_jax.errors import InputError
from glm2_jax.family import ROLE_TOKENS
from glm2_jax.prompt import build_messages, build_prompt
from glm2_jax.tokenizer import Tokenizer
from train.data.formats import Message


class Encoder:
    """Turns conversations into sequences.

    Args:
        tokenizer: of the model.
        template: "chatglm2", "chatglm3" or "raw".
        train_on_prompt: learn all but the ids that every sequence begins with.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, train_on_prompt: bool = False):
        self.tokenizer, self.template = tokenizer, template
        self.train_on_prompt = train_on_prompt

    def count(self, messages: Sequence[Message]) -> int:
        """How many sequences a conversation is."""
        if self.template == "chatglm3":
            return 1
        return sum(message["role"] == "assistant" for message in messages)

    def encode(self, messages: Sequence[Message], number: int) -> tuple[list[int], list[bool]]:
        """The ids of one of its sequences, and which of them are learned.

        Raises:
            InputError: the template cannot write the conversation.
        """
        whole = self.template == "chatglm3"
        ids, learned = self._roles(messages) if whole else self._round(messages, number)
        if self.train_on_prompt:
            given = len(self.tokenizer.prefix_ids)
            learned = [False] * given + [True] * (len(ids) - given)
        return ids, learned

    def _roles(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        special, ids = self.tokenizer.special, build_messages(self.tokenizer, messages)
        ids[-1] = self.tokenizer.eos_id  # instead of the role that would answer next
        roles = {special[name] for name in ROLE_TOKENS}
        learned, answering = [], False
        for token in ids:
            learned.append(answering)
            if token in roles:
                answering = token == special["<|assistant|>"]
        return ids, learned

    def _round(self, messages: Sequence[Message], number: int) -> tuple[list[int], list[bool]]:
        system, turns = _turns(messages, self.template)
        query, answer = turns[number]
        ids = build_prompt(self.tokenizer, self.template, query, turns[:number], system)
        prompt = len(ids)
        ids += [*self.tokenizer.encode(answer), self.tokenizer.eos_id]
        return ids, [False] * prompt + [True] * (len(ids) - prompt)


def _turns(messages: Sequence[Message], template: str) -> tuple[str | None, list[tuple[str, str]]]:
    """The system text, and questions with their answers."""
    first = messages[0]["role"] == "system"
    for number, message in enumerate(messages, 1):
        where, role = f"message {number}", message["role"]
        if message.get("metadata") or message.get("tools"):
            raise InputError(f"{where} has metadata or tools", f"{template} cannot write them")
        due = "assistant" if (number - first) % 2 == 0 else "user"
        if role != due and not (first and number == 1):
            why = f"{template} only knows questions and answers in turn"
            raise InputError(f"{where} is of the role {role}, not {due}", why)
    texts = [message["content"] for message in messages[first:]]
    return (
        messages[0]["content"] if first else None,
        list(zip(texts[::2], texts[1::2], strict=True)),
    )
