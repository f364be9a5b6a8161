"""Encodes conversations as token sequences, exactly as the model sees them when it answers.

Templates of roles (ChatGLM3, GLM-4) only append to a conversation, so all of it is one sequence in
which every answer is learned, with the id that follows and ends it. The others write the prompt
again for every question: there a past answer has other tokens than when it was given, and no end
token. So every answer is a separate sequence, after its prompt. The answer to a blank (GLM) follows
the text and the answers to the blanks before it, each with its start id and none with its end, as
when they are filled one after another.

A plain text is divided by `glm2_jax.datasets.texts`.

A message with `"loss": False` is never learned: in a sequence of roles its tokens are left out of
the loss; in the others such an answer has no sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from glm2_jax.datasets import TEXT
from glm2_jax.datasets.formats import Message
from glm2_jax.datasets.texts import Texts
from glm2_jax.errors import InputError, UsageError
from glm2_jax.text.prompt import MASKS, build_followup, build_prompt, with_blank
from glm2_jax.text.roles import build_messages, message_ids
from glm2_jax.text.template import find_template
from glm2_jax.text.tokenizer import Tokenizer


class Encoder:
    """Encodes conversations for one of `choices.TEMPLATES`.

    With `train_on_prompt` everything is learned except the ids that every sequence begins with.
    `texts` encodes plain texts, None = there are none. UsageError: `train_on_prompt` is asked of a
    model whose prompts are read in both directions.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        train_on_prompt: bool = False,
        texts: Texts | None = None,
    ):
        if train_on_prompt and tokenizer.suffix_ids:
            raise UsageError(
                f"--train-on-prompt is not supported for a {tokenizer.family} model",
                "Each token of its prompt sees the next one, so there is nothing to learn.",
                "Leave it out.",
            )
        self.tokenizer, self.template = tokenizer, template
        self.written = find_template(template)
        self.train_on_prompt, self.texts = train_on_prompt, texts

    def count(self, messages: Sequence[Message]) -> int:
        """Return the number of sequences of a conversation; 0 where nothing is learned."""
        if self.texts is not None and messages[0]["role"] == TEXT:
            return self.texts.count(messages[0]["content"], messages[0]["ends"])
        if self.written.fills:
            return sum(map(self._is_learned, self._filled(messages)[1]))
        self._refuse_lists(messages)
        if self.written.roles:
            return int(any(map(self._is_learned, messages)))
        return len(self._learned_turns(messages))

    def encode(self, messages: Sequence[Message], number: int) -> tuple[list[int], list[bool]]:
        """Return the ids of one of its sequences, and which of them are learned; InputError if the
        template cannot express the conversation."""
        if self.texts is not None and messages[0]["role"] == TEXT:
            return self.texts.encode(messages[0]["content"], messages[0]["ends"], number)
        if self.written.roles:
            return self._roles(messages)
        if self.written.fills:
            _, answers = self._filled(messages)
            at = [n for n, answer in enumerate(answers) if self._is_learned(answer)][number]
            before, ids = self._blank(messages, at), self.tokenizer.encode(answers[at]["content"])
            ids.append(self.tokenizer.eos_id)
            return before + ids, [False] * len(before) + [True] * len(ids)
        return self._round(messages, self._learned_turns(messages)[number])

    def question(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids before the last answer; InputError as `encode`."""
        if self.written.fills:
            return self._blank(messages, -1)
        self._refuse_lists(messages)
        if self.written.roles:
            return build_messages(self.tokenizer, _unmarked(messages[:-1]), self.template)
        system, turns = _turns(messages, self.template)
        return build_prompt(self.tokenizer, self.template, turns[-1][0], turns[:-1], system)

    def _is_learned(self, message: Message) -> bool:
        kind = message["role"] == "assistant" or self.train_on_prompt
        return kind and message.get("loss", True)

    def _refuse_lists(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if "part_of" in message:
                why = f"it is of type list, but {self.template} has no blanks that it could fill"
                raise InputError(f"{message['part_of']} is not a string", why)

    def _filled(self, messages: Sequence[Message]) -> tuple[list[int], Sequence[Message]]:
        """Return the ids before the first answer, and the answer to each blank."""
        text, *answers = messages
        why = f"{self.template} takes one text with blanks, and an answer to each"
        if text["role"] == "system":
            raise InputError("a row of a GLM model takes no system text", why)
        for number, message in enumerate(messages, 1):
            role = "user" if number == 1 else "assistant"
            if message["role"] != role or message.get("metadata") or message.get("tools"):
                raise InputError(f"message {number} is not plain text of the role {role}", why)
        written = with_blank(self.tokenizer, self.template, text["content"])
        if (blanks := len(MASKS.findall(written))) != len(answers):
            raise InputError(
                "there must be as many answers as blanks",
                f"answers: {len(answers)}, blanks: {blanks}; several answers are a list",
            )
        return build_prompt(self.tokenizer, self.template, written), answers

    def _blank(self, messages: Sequence[Message], number: int) -> list[int]:
        """Return the ids before the answer to a blank."""
        ids, answers = self._filled(messages)
        start = ids[-1]
        for answer in answers[:number]:
            ids += [*self.tokenizer.encode(answer["content"]), start]
        return ids

    def _learned_turns(self, messages: Sequence[Message]) -> list[int]:
        """Return the turns whose answer, or with `train_on_prompt` any message, is learned."""
        _turns(messages, self.template)  # questions and answers in turn
        first = messages[0]["role"] == "system"
        pairs = zip(messages[first::2], messages[first + 1 :: 2], strict=True)
        return [n for n, pair in enumerate(pairs) if any(map(self._is_learned, pair))]

    def _roles(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        ids = list(self.tokenizer.prefix_ids)
        learned = [False] * len(ids)
        within = self.train_on_prompt and self._is_learned(messages[0])
        parts = message_ids(self.tokenizer, _unmarked(messages), self.template)
        for message, part in zip(messages, parts, strict=True):
            learned.append(within)  # the role that follows an answer ends it
            within = self._is_learned(message)
            learned += [within] * (len(part) - 1)
            ids += part
        return [*ids, self.tokenizer.eos_id], [*learned, within]

    def _round(self, messages: Sequence[Message], turn: int) -> tuple[list[int], list[bool]]:
        system, turns = _turns(messages, self.template)
        query, answer = turns[turn]
        ids = build_prompt(self.tokenizer, self.template, query, turns[:turn], system)
        prompt = len(ids)
        start = prompt - self.written.learns_start  # everything from there on is learned
        ids += [*self.tokenizer.encode(answer), self.tokenizer.eos_id]
        at = (messages[0]["role"] == "system") + 2 * turn  # of the question
        if all(map(self._is_learned, messages[: at + 1])):
            start = len(self.tokenizer.prefix_ids)
        elif self._is_learned(messages[at]) and turn:
            # Earlier rounds hold text that must not be learned; the parts that may be learned are
            # in their own sequences.
            start = prompt - len(build_followup(self.tokenizer, query, turn + 1))
        learned = [False] * start + [True] * (prompt - start)
        return ids, learned + [self._is_learned(messages[at + 1])] * (len(ids) - prompt)


def _unmarked(messages: Sequence[Message]) -> list[Message]:
    return [{key: m[key] for key in m if key != "loss"} for m in messages]


def _turns(messages: Sequence[Message], template: str) -> tuple[str | None, list[tuple[str, str]]]:
    """Return the system text, and the questions with their answers."""
    first = messages[0]["role"] == "system"
    for number, message in enumerate(messages, 1):
        where, role = f"message {number}", message["role"]
        if message.get("metadata") or message.get("tools"):
            raise InputError(f"{where} has metadata or tools", f"{template} cannot write them")
        due = "assistant" if (number - first) % 2 == 0 else "user"
        if role != due and not (first and number == 1):
            why = f"{template} needs questions and answers to alternate"
            raise InputError(f"{where} has the role {role}, expected {due}", why)
    texts = [message["content"] for message in messages[first:]]
    system = messages[0]["content"] if first else None
    return system, list(zip(texts[::2], texts[1::2], strict=True))
