"""From request bodies to prompt ids and sampling parameters."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from glm2_jax.cli.arguments import MAX_SEED
from glm2_jax.errors import InputError, shorten
from glm2_jax.text.prompt import build_prompt, with_blank
from glm2_jax.text.prompt import text_ids as prompt_ids
from glm2_jax.text.roles import build_messages
from infer.batching.grammar import Matcher
from infer.engine.params import PRESETS, SamplingParams
from infer.serve import messages
from infer.serve.errors import ApiError, of_expected, too_long
from infer.serve.schema import ChatBody, Common, CompletionBody, Message, OfficialBody, Tool
from infer.serve.service import Facts, Service

T = TypeVar("T")
LONG = 4096  # characters or tokens, from which on work is done in another thread
_LONGEST_TEXT, _MOST_IDS = 2**18, 2**16  # of /tokenize and /detokenize, at least
_TINY = 1e-30  # the top_p that keeps only the likeliest token


@dataclass(frozen=True)
class Prompt:
    """The ids that the model reads, of which the client did not send the first `hidden`."""

    ids: list[int]
    hidden: int = 0


@dataclass(frozen=True)
class Sampled:
    """How each prompt of a request is answered: how often, and how.

    `grammars` has what each of the `count` answers must match; () = they are free.
    """

    sampling: SamplingParams
    count: int
    clean: bool
    score_prompt: int | None = None
    grammars: tuple[Matcher, ...] = ()


async def chat_prompt(
    facts: Facts, asked: Sequence[Message], tools: Sequence[Tool], begun: Sequence[str] = ()
) -> Prompt:
    """Return the prompt of a chat; ApiError, InputError: the template cannot express it.

    An answer with roles continues the texts of `begun`: first the line of metadata.
    """

    def build() -> list[int]:
        if facts.written.roles:
            written = messages.with_roles(asked, tools, facts.written.calls)
            ids = build_messages(facts.tokenizer, written, facts.template)
            # Encoded separately, as in a history.
            return ids + [token for text in begun for token in facts.tokenizer.encode(text)]
        if not facts.written.chat:
            raise ApiError(
                400,
                "This model has no chat template; use /v1/completions.",
                code="unsupported_parameter",
                param="messages",
            )
        turns = messages.rounds(asked, tools)
        return build_prompt(facts.tokenizer, facts.template, *turns)

    size = sum(len(messages.text_of(message)) for message in asked)
    _check_size(facts, size, "messages")
    long = bool(tools) or any(message.tool_calls for message in asked) or size > LONG
    ids = await elsewhere(build, long)
    return Prompt(ids, len(ids))


async def text_prompts(facts: Facts, body: CompletionBody) -> list[Prompt]:
    """Return the prompts of a completion, with the ids that begin every sequence of the family."""
    given: Any = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]

    if body.echo and body.logprobs is not None and facts.tokenizer.suffix_ids:
        raise ApiError(
            400,
            "`echo` with `logprobs` is not supported: the tokens of this model's prompts see each "
            "other in both directions, so none of them has a probability.",
            code="unsupported_parameter",
            param="echo",
        )

    def build() -> list[Prompt]:
        return [_complete(facts, prompt) for prompt in given]

    size = sum(map(len, given))
    for prompt in given:
        if isinstance(prompt, str):
            _check_size(facts, len(prompt), "prompt")
        else:
            _check_ids(facts, prompt, "prompt")
    try:
        return await elsewhere(build, size > LONG)
    except InputError as error:  # blanks of several kinds
        raise of_expected(error, "prompt") from error


def _check_size(facts: Facts, characters: int, param: str) -> None:
    """Raise ApiError, before all of it is encoded, for a text that is certain not to fit."""
    least = characters // facts.longest_token
    if least >= facts.max_length:
        raise too_long(least, None, facts.max_length, param)


def _check_ids(facts: Facts, ids: Iterable[int], param: str) -> None:
    """Raise ApiError for an id that the model does not have."""
    largest = max(ids, default=0)
    if largest >= facts.vocab_size:
        raise ApiError(
            400,
            f"`{param}` has the token id {largest}; "
            f"the model's ids are whole numbers from 0 to {facts.vocab_size - 1}.",
            code="invalid_value",
            param=param,
        )


def _complete(facts: Facts, prompt: str | list[int]) -> Prompt:
    """Return a text, or ids, between what begins and ends every prompt; ids may have it already."""
    tokenizer, prefix = facts.tokenizer, facts.tokenizer.prefix_ids
    if isinstance(prompt, str):
        kind = facts.template if facts.written.fills else "raw"
        text = with_blank(tokenizer, kind, prompt)
        ids = prompt_ids(tokenizer, kind, text) if text.strip() else tokenizer.start_ids
        return Prompt(ids, len(prefix))
    suffix = tokenizer.suffix_ids
    after = [] if suffix[-1:] and suffix[-1] in prompt else suffix
    hidden = 0 if prompt[: len(prefix)] == prefix else len(prefix)
    return Prompt([*prefix[:hidden], *prompt, *after], hidden)


async def text_ids(facts: Facts, text: str, *, complete: bool) -> list[int]:
    """Return the ids of a text, alone or as a `complete` prompt.

    ApiError for one that is much longer than the context.
    """
    most = max(_LONGEST_TEXT, 16 * facts.max_length)
    if len(text) > most:
        raise ApiError(
            400,
            f"The text has {len(text)} characters; at most {most} are tokenized at once, "
            f"which is several times the context of {facts.max_length} tokens. Split it.",
            code="invalid_value",
            param="prompt",
        )

    def build() -> list[int]:
        return _complete(facts, text).ids if complete else facts.tokenizer.encode(text)

    return await elsewhere(build, len(text) > LONG)


async def text_of_ids(facts: Facts, ids: Sequence[int]) -> str:
    """Return the text of ids; ApiError for many more than the context has."""
    most = max(_MOST_IDS, 4 * facts.max_length)
    if len(ids) > most:
        raise ApiError(
            400,
            f"There are {len(ids)} ids; at most {most} are decoded at once, "
            f"which is several times the context of {facts.max_length} tokens. Split them.",
            code="invalid_value",
            param="tokens",
        )
    return await elsewhere(lambda: facts.tokenizer.decode(ids), len(ids) > LONG)


async def official_prompt(facts: Facts, body: OfficialBody) -> Prompt:
    """Return the prompt of the official API."""
    history = body.history or []

    def build() -> list[int]:
        text = with_blank(facts.tokenizer, facts.template, body.prompt)
        return build_prompt(facts.tokenizer, facts.template, text, history)

    size = len(body.prompt) + sum(len(text) for turn in history for text in turn)
    _check_size(facts, size, "prompt")
    ids = await elsewhere(build, size > LONG)
    return Prompt(ids, len(ids))


async def elsewhere(build: Callable[[], T], long: bool) -> T:
    """Return the result of `build`, from another thread where it takes `long`.

    Clients share the event loop: what takes more than a few milliseconds must not run there.
    """
    return await asyncio.to_thread(build) if long else build()


def official_sampled(facts: Facts, body: OfficialBody) -> Sampled:
    """Return how the prompt of the official API is answered."""
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": None if body.top_p is None else max(body.top_p, _TINY),
        "max_length": body.max_length,
    }
    given = {name: value for name, value in given.items() if value is not None}
    seed = secrets.randbits(63)
    sampling = dataclasses.replace(PRESETS["api"], seed=seed, **given)
    return Sampled(sampling, 1, clean=facts.written.chat)


def sampled(
    service: Service,
    body: Common,
    *,
    limit: int | None,
    logprobs: int | None,
    clean: bool,
    score_prompt: int | None = None,
) -> Sampled:
    """Return how a body says its prompts are answered; ApiError, UsageError: it cannot be."""
    count = body.n or 1
    if body.best_of not in (None, count):
        raise ApiError(
            400,
            "`best_of` must be equal to `n`: choosing among more answers is not supported.",
            code="unsupported_parameter",
            param="best_of",
        )
    biases = _biases(body.logit_bias)
    _check_ids(service.facts, [token for token, _ in biases], "logit_bias")
    _check_ids(service.facts, body.stop_token_ids or (), "stop_token_ids")
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": None if body.top_p is None else max(body.top_p, _TINY),
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": biases,
        "stop_token_ids": None if body.stop_token_ids is None else tuple(body.stop_token_ids),
        "ignore_eos": body.ignore_eos,
        "max_new_tokens": limit,
        "stop": _stop_strings(body.stop),
        "logprobs": logprobs,
        "loop_stop": body.loop_stop,
    }
    given = {name: value for name, value in given.items() if value is not None}
    seed = secrets.randbits(63) if body.seed is None else body.seed % (MAX_SEED + 1)
    sampling = dataclasses.replace(service.defaults, max_length=None, seed=seed, **given)
    return Sampled(sampling, count, clean, score_prompt)


def chat_sampled(service: Service, body: ChatBody) -> Sampled:
    """Return how the prompt of a chat is answered."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    return sampled(
        service,
        body,
        limit=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        clean=True,
    )


def text_sampled(service: Service, body: CompletionBody) -> Sampled:
    """Return how the prompts of a completion are answered."""
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "`max_tokens: 0` needs `echo: true`.", param="max_tokens")
    return sampled(
        service,
        body,
        limit=16 if body.max_tokens is None else max(body.max_tokens, 1),
        logprobs=body.logprobs,
        clean=False,
        score_prompt=body.logprobs if body.echo else None,
    )


def check_lengths(facts: Facts, prompts: Sequence[Prompt], answer: int | None, param: str) -> None:
    """Raise ApiError for a prompt that does not fit the context with its answer."""
    for prompt in prompts:
        if len(prompt.ids) + (answer or 1) > facts.max_length:
            raise too_long(len(prompt.ids), answer, facts.max_length, param)


def _biases(given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    """Return (id, bias) of each; ApiError for what is no id."""
    for name in given or ():
        if not name.isdecimal() or len(name) > 9:
            raise ApiError(
                400,
                f"The keys of `logit_bias` must be token ids, got {shorten(name)}.",
                code="invalid_value",
                param="logit_bias",
            )
    return tuple((int(name), bias) for name, bias in (given or {}).items())


def _stop_strings(stop: str | list[str | None] | None) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else stop or []
    return tuple(string for string in strings if string)  # clients pad the list with null and ""
