"""From events and completions to the JSON of answers and of the chunks of a stream."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from glm2_jax.text.tokenizer import Detokenizer, Tokenizer
from infer.batching.job import Job
from infer.engine.answer import Completion, StopStrings, TokenLogprob
from infer.engine.rows import TokenEvent
from infer.serve import tool_calls
from infer.serve.prompts import Prompt

_LEAST = -9999.0  # JSON has no -Infinity
_HEADERS = ("\n<|assistant|>", "<|assistant|>", "\n<|observation|>", "<|observation|>")
_REASONS = {"stop": "stop", "observation": "stop", "length": "length", "loop": "length"}
Json = dict[str, Any]


def head(prefix: str, kind: str, model: str, fingerprint: str) -> Json:
    """Return what every chunk of an answer has: one id for all of them."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


def usage(jobs: Sequence[Job], completions: Iterable[Completion], per_prompt: int) -> Json:
    """Return the tokens of a request; a prompt with several answers counts once."""
    firsts = [job.row for job in jobs[::per_prompt]]
    read = sum(len(row.ids) for row in firsts)
    written = sum(len(completion.output_ids) for completion in completions)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(row.stats.reused_tokens for row in firsts)},
    }


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token; of a part of a character "bytes:\\xe4", of a special token its
    name."""
    raw = tokenizer.raw_bytes(token)
    if raw is not None:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    special = (name for name, known in tokenizer.special.items() if known == token)
    return tokenizer.token_text(token) or next(special, "") or tokenizer.piece(token)


def _token_of(entry: TokenLogprob | int) -> int:
    return entry if isinstance(entry, int) else entry.token


def _ending(completion: Completion) -> Json:
    reason = completion.finish_reason
    why = "loop" if reason == "loop" else completion.stop_reason
    return {"finish_reason": _REASONS[reason], "stop_reason": why}


class Shape(Protocol):
    """Knows the choices of one request.

    Attributes:
        answer: whether they show more than the prompt.
        long: whether a step of a stream may take more than a few milliseconds.
    """

    answer: bool
    long: bool

    def complete(self, index: int, completion: Completion, job: Job) -> Json:
        """Return the choice of a complete answer."""
        ...

    def begin(self, index: int) -> list[Json]:
        """Return the choices of the chunks that begin an answer."""
        ...

    def step(self, index: int, event: TokenEvent, job: Job) -> list[Json]:
        """Return the choices of the chunks that an event makes."""
        ...


class ChatShape:
    """The choices of /v1/chat/completions.

    With `tools`, which says how they are called (see `Template.calls`), calls are taken out of the
    text; the answer is a call of the tool `called`, if one is given, whose beginning the prompt
    has.
    """

    answer, long = True, False

    def __init__(self, tokenizer: Tokenizer, *, tools: str | None, called: str | None = None):
        self._tokenizer, self._tools, self._called = tokenizer, tools, called
        self._held: dict[int, StopStrings] = {}

    def complete(self, index: int, completion: Completion, job: Job) -> Json:
        """Return the choice of a complete answer."""
        text, calls = completion.text, []
        if self._tools:
            text, calls = tool_calls.read(completion, self._tools, self._called)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        logprobs = None
        if completion.logprobs is not None:
            logprobs = {"content": [self._logprob(entry) for entry in completion.logprobs]}
        return {"index": index, "message": message, "logprobs": logprobs, **_end(completion, calls)}

    def begin(self, index: int) -> list[Json]:
        """Return the chunk's choice that begins an answer."""
        return [_chunk(index, {"role": "assistant", "content": ""})]

    def step(self, index: int, event: TokenEvent, job: Job) -> list[Json]:
        """Return the choices of the chunks that an event makes."""
        text, completion, calls = event.text, event.completion, []
        if self._tools:
            text, calls = self._without_calls(index, event)
        logprobs = None
        if event.logprob is not None:
            logprobs = {"content": [self._logprob(event.logprob)]}
        choices = []
        if text or logprobs:
            choices.append(_chunk(index, {"content": text}) | {"logprobs": logprobs})
        deltas = tool_calls.deltas(calls)
        choices += [_chunk(index, {"tool_calls": [delta]}) for delta in deltas]
        if completion is not None:
            choices.append(_chunk(index, {}) | _end(completion, calls))
        return choices

    def _without_calls(self, index: int, event: TokenEvent) -> tuple[str, list[Json]]:
        """Return the text that is certain to be no call, and at the end the calls."""
        if self._called is not None:
            done = event.completion
            return ("", []) if done is None else tool_calls.read(done, self._tools, self._called)
        held = self._held.setdefault(index, StopStrings(_HEADERS))
        text = "" if held.string else held.push(event.text)
        if event.completion is None:
            return text, []
        shown = event.completion.text
        rest, calls = tool_calls.read(event.completion, self._tools)
        if not held.string:
            return text + held.flush(), []
        before = min(shown.find(header) for header in _HEADERS if header in shown)
        later = rest[before:] if calls else shown[before:]
        return text + later, calls

    def _logprob(self, entry: TokenLogprob) -> Json:
        top = [self._token(token, value) for token, value in entry.top]
        return self._token(entry.token, entry.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> Json:
        name = token_name(self._tokenizer, token)
        data = self._tokenizer.token_bytes(token)
        return {"token": name, "logprob": max(logprob, _LEAST), "bytes": list(data)}


def _chunk(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _end(completion: Completion, calls: Sequence[Json]) -> Json:
    called = calls and not tool_calls.cut_off(completion)
    return _ending(completion) | ({"finish_reason": "tool_calls"} if called else {})


class _Places:
    """Where each token of a text begins, of which one comes at a time; offsets in characters.

    The bytes of one character all begin where it does; a token without text, where the next would.
    `before` is the token before the text, if it continues one: its leading space is shown.
    """

    def __init__(self, tokenizer: Tokenizer, start: int, before: int | None = None):
        self._tokenizer, self.start, self._end = tokenizer, start, start
        self._detokenizer = Detokenizer(tokenizer)
        if before is not None:
            self._detokenizer.push(before)
            self._detokenizer.flush()

    def add(self, token: int) -> int:
        """Return where the next token begins."""
        if self._tokenizer.raw_bytes(token) is None:  # a character that is not complete ends
            self._end += len(self._detokenizer.flush())
        place = self._end
        self._end += len(self._detokenizer.push(token))
        return place


Entry = tuple[TokenLogprob | int, int]  # what is known of a token, or its bare id; its offset


class TextShape:
    """The choices of /v1/completions; with `echo` they begin with the prompt."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        count: int,
        echo: bool,
        logprobs: bool,
        answer: bool,
    ):
        """`count` answers to each prompt; without `answer`, only the prompt is shown."""
        self._tokenizer, self._prompts, self._count = tokenizer, prompts, count
        self._echo, self._logprobs, self.answer = echo, logprobs, answer
        self.long = echo
        self._places: dict[int, _Places] = {}  # of the answers that have begun

    def complete(self, index: int, completion: Completion, job: Job) -> Json:
        """Return the choice of a complete answer."""
        text, entries = self._prompt_part(index, job)
        if self.answer:
            text += completion.text
            entries += self._placed(index, self._answer_entries(completion), completion)
        return self._choice(index, text, entries) | _ending(completion)

    def begin(self, index: int) -> list[Json]:
        """Return no choice: an answer begins with its text."""
        return []

    def step(self, index: int, event: TokenEvent, job: Job) -> list[Json]:
        """Return the choices of the chunks that an event makes."""
        text, entries = ("", []) if index in self._places else self._prompt_part(index, job)
        if self.answer:
            text += event.text
            known = [] if event.logprob is None else [event.logprob]
            entries += self._placed(index, known, event.completion)
        choices = []
        if text or entries:
            ending = {"finish_reason": None, "stop_reason": None}
            choices.append(self._choice(index, text, entries) | ending)
        if event.completion is not None:
            choices.append(self._choice(index, "", []) | _ending(event.completion))
        return choices

    def _prompt(self, index: int) -> Prompt:
        return self._prompts[index // self._count]

    def _prompt_part(self, index: int, job: Job) -> tuple[str, list[Entry]]:
        """Return what is shown of the prompt: what the client sent. The answer begins after it."""
        prompt, text, entries = self._prompt(index), "", []
        if self._echo:
            text = self._tokenizer.decode(prompt.ids[prompt.hidden :])
        if self._echo and self._logprobs:
            self._places[index] = _Places(self._tokenizer, 0)
            known = [prompt.ids[0], *job.prompt_logprobs]  # nothing comes before the first token
            entries = self._placed(index, known[prompt.hidden :])
        self._places[index] = _Places(self._tokenizer, len(text), prompt.ids[-1])
        return text, entries

    def _placed(
        self,
        index: int,
        known: Sequence[TokenLogprob | int],
        completion: Completion | None = None,
    ) -> list[Entry]:
        """Return entries with their offsets, none past the end of a complete answer.

        The tokens of a stop string would begin there.
        """
        places = self._places[index]
        end = sys.maxsize if completion is None else places.start + len(completion.text)
        return [(one, min(places.add(_token_of(one)), end)) for one in known]

    def _answer_entries(self, completion: Completion) -> list[TokenLogprob | int]:
        """Return an entry for each token; when scoring, also for an end token.

        Clients that score a prompt take the last entry for that of the one token they asked for.
        """
        entries: list[TokenLogprob | int] = [*(completion.logprobs or ())]
        if self._echo and isinstance(completion.stop_reason, int):
            entries.append(completion.stop_reason)
        return entries

    def _choice(self, index: int, text: str, entries: Sequence[Entry]) -> Json:
        logprobs = self._logprob_lists(entries) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs}

    def _logprob_lists(self, entries: Sequence[Entry]) -> Json:
        result: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for entry, place in entries:
            known = isinstance(entry, TokenLogprob)
            name = token_name(self._tokenizer, _token_of(entry))
            result["tokens"].append(name)
            result["token_logprobs"].append(max(entry.logprob, _LEAST) if known else None)
            result["top_logprobs"].append(self._top(name, entry) if known else None)
            result["text_offset"].append(place)
        return result

    def _top(self, name: str, entry: TokenLogprob) -> Mapping[str, float]:
        """Return the alternatives by text, likeliest first, and the token itself."""
        found: dict[str, float] = {}
        for token, value in entry.top:
            found.setdefault(token_name(self._tokenizer, token), max(value, _LEAST))
        found.setdefault(name, max(entry.logprob, _LEAST))
        return found
