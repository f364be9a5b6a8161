"""From a request to token ids, and from a completion to JSON."""

from typing import Any

from glm2_jax.cli.messages import note
from glm2_jax.config import GLMConfig
from glm2_jax.errors import InputError
from glm2_jax.text.prompt import MASKS, truncate_prompt
from glm2_jax.text.roles import build_messages
from infer.engine.answer import Completion
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.requests.request import Request


def encode(
    engine: Engine, request: Request, sampling: SamplingParams, truncate: int | None, where: str
) -> list[int]:
    """Return the ids of a request's prompt, which leave room for an answer.

    Where `truncate` is given, a longer prompt is cut to so many tokens, and that is reported with
    `where`, its file and line. InputError: the template cannot express the request, or it is too
    long.
    """
    ids = _build(engine, request, truncate, where)
    note_blanks(engine, request.prompt, only_first=True, where=where)
    limit = min(engine.max_length, sampling.max_length or engine.max_length)
    if len(ids) >= limit:
        raise InputError(
            f"The prompt is too long: {len(ids)} tokens.",
            f"Prompt and answer together may have {limit} ({_longest(engine.config)}).",
            "Shorten it, raise --max-length as far as the model goes, or add --truncate-prompt.",
        )
    return ids


def _longest(config: GLMConfig) -> str:
    if config.context_limit > config.seq_length:
        return f"the model was trained on {config.seq_length}, and computes more"
    return f"the model has {config.context_limit}"


def _build(engine: Engine, request: Request, truncate: int | None, where: str) -> list[int]:
    tokenizer, template = engine.tokenizer, engine.template
    if request.messages is not None:
        if not engine.written.roles:
            raise InputError(
                "messages need the template chatglm3 or glm4.", f"The template here is {template}."
            )
        ids = build_messages(tokenizer, request.messages, template)
        if truncate and len(ids) > truncate:
            raise InputError(
                f"The messages are too long: {len(ids)} tokens, --truncate-prompt {truncate}.",
                "Messages are never cut.",
            )
        return ids
    asked = request.prompt, request.history, request.system
    if not truncate:
        return engine.build_prompt(*asked)
    ids, turns, tokens = truncate_prompt(tokenizer, template, *asked, truncate)
    if turns or tokens:
        what = [f"the oldest {turns} of {len(request.history)} turns"] if turns else []
        what += [f"the last {tokens} tokens of the question"] if tokens else []
        prefix = f"{where}: " if where else ""
        note(f"{prefix}prompt cut to {len(ids)} tokens: left out {' and '.join(what)}")
    return ids


def note_blanks(engine: Engine, text: str, *, only_first: bool = False, where: str = "") -> None:
    """Report that a text without a blank is continued, and, with `only_first`, that of several
    blanks one is filled; `where` is its file and line, of which the first is not reported."""
    blanks = len(MASKS.findall(text))
    if not engine.written.fills or not text.strip():
        return
    if not blanks and not where:
        blank = engine.tokenizer.blank
        note(f"the prompt has no blank: continuing it, as if it ended in {blank}")
    elif blanks > 1 and only_first:
        prefix = f"{where}: " if where else ""
        note(
            f"{prefix}the prompt has {blanks} blanks: only the first is filled; "
            "python -m infer.fill fills all of them"
        )


def warn_beyond_aligned(engine: Engine, longest: int, sampling: SamplingParams) -> bool:
    """Warn if a prompt of `longest` tokens and its answer may exceed the aligned length."""
    limit = min(engine.max_length, sampling.max_length or engine.max_length)
    end = min(limit, longest + (sampling.max_new_tokens or limit))
    aligned = engine.config.aligned_length
    if end > aligned:
        note(
            f"warning: prompt and answer may reach {end} tokens; "
            f"beyond {aligned}, the length this model was aligned to, answers get worse"
        )
    return end > aligned


def result(engine: Engine, request: Request, completion: Completion) -> dict[str, Any]:
    """Return the object that `--json` prints for a prompt."""
    tokenizer = engine.tokenizer
    special = {token: name for name, token in tokenizer.special.items()}

    def named(token: int) -> dict[str, Any]:  # a lone byte has no text, its piece names it
        text = tokenizer.token_text(token) or tokenizer.piece(token) or special.get(token, "")
        return {"id": token, "token": text}

    asked = {"prompt": request.prompt}
    if request.messages is not None:
        asked = {"messages": list(request.messages)}
    read, written = len(completion.prompt_ids), len(completion.output_ids)
    answer: dict[str, Any] = {
        **({} if request.id is None else {"id": request.id}),
        **asked,
        "prompt_ids": list(completion.prompt_ids),
        "output_ids": list(completion.output_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        },
    }
    if completion.messages:
        answer["output_messages"] = [message._asdict() for message in completion.messages]
    if (reason := completion.stop_reason) is not None:
        answer["stop_reason"] = {"string": reason} if isinstance(reason, str) else named(reason)
    if completion.logprobs is not None:
        answer["logprobs"] = [
            named(entry.token)
            | {"logprob": entry.logprob}
            | {"top": [named(token) | {"logprob": value} for token, value in entry.top]}
            for entry in completion.logprobs
        ]
    return answer
