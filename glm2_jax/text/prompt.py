"""Prompts as ids, by the templates of `glm2_jax.text.template`.

The text of questions and answers is encoded by the tokenizer alone, so it never becomes a special
id; the one exception are the masks of a text whose blanks are to be filled.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from glm2_jax.errors import CheckpointError, InputError
from glm2_jax.text.roles import build_messages, is_reply, reply_messages
from glm2_jax.text.template import CHATGLM2_ROUNDS, TEMPLATES, Rounds, find_template
from glm2_jax.text.tokenizer import SPACE_MARK, Tokenizer

Turns = Sequence[Sequence[Any]]  # [question, `roles.Reply`]
MASKS = re.compile(r"(\[[gs]?MASK\])")  # where a text has blanks


def build_prompt(
    tokenizer: Tokenizer,
    template: str,
    query: str,
    history: Turns = (),
    system: str | None = None,
) -> list[int]:
    """Build the ids of a prompt by one of `choices.TEMPLATES`.

    `query` is the question, `history` are (question, answer) pairs, oldest first. An answer is
    text; where messages have roles it may be a list of messages, as `build_messages` takes them.
    Templates of rounds have no place for `system` instructions: they precede the first question.
    """
    _check_turns(query, history, system)
    found = find_template(template)
    if found.roles:
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        for question, answer in history:
            messages += [{"role": "user", "content": question}, *reply_messages(answer)]
        return build_messages(tokenizer, [*messages, {"role": "user", "content": query}], template)
    if found.rounds is not None:
        return text_ids(tokenizer, "raw", rounds_text(found.rounds, query, history, system))
    if history or system:
        family = tokenizer.family
        others = [name for name, x in TEMPLATES.items() if x.chat and family in x.families]
        other = f", or use the template {' or '.join(others)}" if others else ""
        raise InputError(
            f"The {template} template takes neither history nor a system text.",
            "It passes the text to the model as it is.",
            f"Write everything into the prompt{other}.",
        )
    return text_ids(tokenizer, template, query)


def text_ids(tokenizer: Tokenizer, template: str, text: str) -> list[int]:
    """Return the ids of a text alone, between those that begin and end every prompt.

    With a template that fills blanks, masks in the text become their ids. InputError: masks of
    different kinds, or of a kind that the tokenizer does not have.
    """
    ids = tokenizer.encode(text)
    if find_template(template).fills:
        # The published tokenizer parses masks, and drops the white space around them.
        parts = MASKS.split(text)
        mask = _mask_id(tokenizer, mask_of(text))
        encoded = (tokenizer.encode(part.strip()) for part in parts[::2])
        ids = next(encoded) + [token for part in encoded for token in (mask, *part)]
    return [*tokenizer.prefix_ids, *ids, *tokenizer.suffix_ids]


def with_blank(tokenizer: Tokenizer, template: str, text: str, mask: str | None = None) -> str:
    """Return a text as a template that fills blanks is asked: one without a blank is continued, so
    a mask follows it, by default that of a long text. Other templates take it as it is."""
    if not find_template(template).fills or MASKS.search(text) or not text.strip():
        return text
    return text + (mask or tokenizer.blank)


def mask_of(text: str) -> str | None:
    """Return the mask of the blanks of a text, None if it has none; InputError: several kinds."""
    kinds = list(dict.fromkeys(MASKS.findall(text)))
    if len(kinds) > 1:
        raise InputError(
            f"The prompt has {' and '.join(kinds)}.",
            "All blanks of a text must be of one kind.",
            "Use [MASK] for words, [sMASK] for sentences, or [gMASK] for a text of any length.",
        )
    return kinds[0] if kinds else None


def _mask_id(tokenizer: Tokenizer, mask: str | None) -> int:
    """Return the id of a mask, -1 for None."""
    if mask is None:
        return -1
    if mask not in tokenizer.special:
        raise InputError(f"This model has no {mask}.", fix="Use [MASK].")
    return tokenizer.special[mask]


def chatglm2_text(query: str, history: Turns = (), system: str | None = None) -> str:
    """Return the text of a ChatGLM2 prompt; errors as `rounds_text`."""
    return rounds_text(CHATGLM2_ROUNDS, query, history, system)


def rounds_text(rounds: Rounds, query: str, history: Turns = (), system: str | None = None) -> str:
    """Return the text of a prompt of rounds; InputError if an answer is a list of messages."""
    questions = [question for question, _ in history] + [query]
    if system:
        questions[0] = f"{system}\n{questions[0]}"
    for number, (_, answer) in enumerate(history, 1):
        if not isinstance(answer, str):
            raise InputError(
                f"The answer in turn {number} of the history is a list of messages.",
                "Only the chatglm3 and glm4 templates support them.",
                "Write the answer as text.",
            )
    answers = [answer for _, answer in history]
    return rounds.text(questions[-1], list(zip(questions, answers, strict=False)))


def build_followup(tokenizer: Tokenizer, query: str, round_number: int) -> list[int]:
    """Build the ids that continue a ChatGLM2 conversation whose last answer is in the cache.

    They are exactly the end of the full prompt's ids: a newline is a byte piece, which never
    merges, so only the dummy prefix has to go. If a tokenizer merges newlines, so that no such
    suffix exists, or the ids of a prompt end with more than its text, it raises CheckpointError.
    `round_number` is 2 or more.
    """
    _check_turns(query, (), None)
    rounds = CHATGLM2_ROUNDS
    ids = tokenizer.encode(rounds.gap + rounds.round(round_number - 1, query))
    if tokenizer.adds_dummy_prefix and tokenizer.piece(ids[0]) == SPACE_MARK:
        ids = ids[1:]
    if tokenizer.suffix_ids or [tokenizer.byte_value(i) for i in ids[:2]] != [10, 10]:
        raise CheckpointError(
            "This tokenizer cannot continue a conversation piecewise.",
            "It has pieces that contain a newline, so text is split differently at the seam.",
            "Build the complete prompt for every question.",
        )
    return ids


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
        text = with_blank(tokenizer, template, query[:characters])
        return build_prompt(tokenizer, template, text, kept, system)

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


def _check_turns(query: object, history: object, system: object) -> None:
    for name, text in (("prompt", query), ("system text", "" if system is None else system)):
        if not isinstance(text, str):
            raise InputError(
                f"The {name} is not a string.", f"It is of type {type(text).__name__}."
            )
    if not str(query).strip():
        raise InputError("The prompt is empty.", "There is nothing to answer.", "Write a text.")
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise InputError("The history is not a list of [question, answer] pairs.")
    for number, turn in enumerate(history, 1):
        pair = isinstance(turn, Sequence) and not isinstance(turn, str) and len(turn) == 2
        if not pair or not isinstance(turn[0], str) or not is_reply(turn[1]):
            raise InputError(f"Turn {number} of the history is not a [question, answer] pair.")
