"""One growing answer on the host: ids to text, clean-up, stop strings, and when it ends.

Stop strings are searched in the text that is shown: after the clean-up, so that neither stripped
white space nor the empty metadata line of a ChatGLM3 answer can end it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from glm2_jax.errors import UsageError
from glm2_jax.text.cleanup import Cleaner, overlap, replaced
from glm2_jax.text.roles import ROLES, Reply
from glm2_jax.text.tokenizer import Detokenizer, Tokenizer
from infer.engine.loops import LoopDetector
from infer.engine.params import SamplingParams
from infer.engine.stats import Stats


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token drawn, and of the likeliest, under the unfiltered model."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Message(NamedTuple):
    """A message of an answer with roles."""

    role: str  # "assistant", or another role that the model wrote
    metadata: str  # the name of the tool that it calls, or ""
    content: str

    @property
    def text(self) -> str:
        """The message as the text of an answer that begins with it."""
        header = f"<|{self.role}|>{self.metadata}\n" if self.metadata else ""
        return (header + self.content).rstrip() if header else self.content


def reply_of(text: str, messages: Sequence[Message]) -> Reply:
    """Return an answer as a history takes it: its text, or its messages if they say more."""
    if not messages:
        return text
    if len(messages) == 1 and messages[0][:2] == ("assistant", ""):
        return messages[0].content
    return [message._asdict() for message in messages]


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes:
        prompt_ids: what the model read.
        output_ids: what it wrote, without the end token. An answer that a stop string ended has
            all tokens up to the one that completed the string.
        text: the answer, without the stop string and what follows it. In an answer with roles every
            message but a plain first one begins with a line of its role token and metadata.
        finish_reason: "stop" (end token or stop string), "observation" (the model wants the result
            of a tool), "length" or "loop" (see `infer.engine.loops`).
        logprobs: one for each of `output_ids`, where asked for.
        messages: what an answer with roles consists of, as far as `text` goes; () for other
            templates, and for ids that were continued as they are.
        stop_reason: the end token or the stop string that ended the answer; else None.
        stats: tokens and seconds of the answer. Those of several: `infer.engine.stats.together`.
    """

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    messages: tuple[Message, ...] = ()
    stop_reason: int | str | None = None
    stats: Stats = field(default_factory=Stats, compare=False, repr=False)

    @property
    def reply(self) -> Reply:
        """The answer as a history takes it, see `reply_of`."""
        return reply_of(self.text, self.messages)


class StopStrings:
    """Passes text on until one of the strings appears, holding back what may become one.

    `string` is the one that was found, or None; with `trim`, white space before it is dropped.
    """

    def __init__(self, strings: Sequence[str], *, trim: bool = False):
        self._strings = strings
        self._trim = trim
        self._held = ""
        self.string: str | None = None

    def push(self, text: str) -> str:
        """Take new text and return what is certain not to belong to a stop string."""
        self._held += text
        places = [(self._held.find(string), string) for string in self._strings]
        found = [place for place in places if place[0] >= 0]
        if found:
            end, self.string = min(found)
        else:
            end = len(self._held) - overlap(self._held, self._strings)
        if self._trim:
            end = len(self._held[:end].rstrip())
        text, self._held = self._held[:end], "" if found else self._held[end:]
        return text

    def flush(self) -> str:
        """Return what was held back, at the end of the answer."""
        text, self._held = self._held, ""
        return text


class PlainText:
    """The text of an answer as it is shown, from ids that come one at a time.

    `push` takes the next id and returns the text that is now certain, `flush` what was held back.
    Without `clean` it continues the text of the prompt, whose `last` id says whether a leading
    space is part of it; for `wide` see `Cleaner`.
    """

    def __init__(self, tokenizer: Tokenizer, last: int, *, clean: bool, wide: bool = False):
        self._detokenizer = Detokenizer(tokenizer)
        self._cleaner = Cleaner(wide=wide) if clean else None
        if not clean:
            self._detokenizer.push(last)
            self._detokenizer.flush()

    def push(self, token: int) -> str:
        text = self._detokenizer.push(token)
        return text if self._cleaner is None else self._cleaner.push(text)

    def flush(self) -> str:
        text = self._detokenizer.flush()
        return text if self._cleaner is None else self._cleaner.push(text) + self._cleaner.flush()

    def messages(self, text: str) -> tuple[Message, ...]:
        return ()


class RoleText:
    """The cleaned text of an answer with roles, which is one message or several; as `PlainText`.

    A message begins with a role token and a line of metadata, which the text shows on a separate
    line, unless it is the first message and plain. As in the published code, a message of a single
    line has no metadata. If the prompt's `last` id is not a role token, the answer continues a
    message whose metadata has been read.
    """

    def __init__(self, tokenizer: Tokenizer, last: int):
        self._tokenizer = tokenizer
        self._roles = {tokenizer.special[f"<|{role}|>"]: role for role in ROLES}
        # Messages without their content, and where header and content begin in the text.
        self._begun: list[tuple[Message, int, int]] = []
        self._shown = 0
        self._begin("assistant", "" if last in self._roles else "\n")

    def push(self, token: int) -> str:
        if token not in self._roles:
            return self._show(self._detokenizer.push(token))
        text = self.flush()
        self._begin(self._roles[token])
        return text

    def flush(self) -> str:
        return self._show(self._detokenizer.flush(), last=True)

    def messages(self, text: str) -> tuple[Message, ...]:
        """Return the messages of which `text`, the beginning of all text, shows something."""
        ends = [header for _, header, _ in self._begun[1:]] + [len(text)]
        return tuple(
            message._replace(content=text[start:end].strip())
            for (message, _, start), end in zip(self._begun, ends, strict=False)
            if start <= len(text)
        )

    def _begin(self, role: str, line: str = "") -> None:
        self._role, self._gap = role, ""
        self._line: str | None = line  # of metadata, as far as it goes; None once it has ended
        self._detokenizer, self._cleaner = Detokenizer(self._tokenizer), Cleaner()

    def _show(self, text: str, *, last: bool = False) -> str:
        header = ""
        if self._line is not None:
            line, newline, rest = (self._line + text).partition("\n")
            if not newline and not last:
                self._line = line
                return ""
            header = self._header(line.strip() if newline else "")
            text, self._line = rest if newline else line, None
        text = self._cleaner.push(text) + (self._cleaner.flush() if last else "")
        if text and self._gap:
            text, self._gap = self._gap + text, ""
        self._shown += len(header + text)
        return header + text

    def _header(self, metadata: str) -> str:
        plain = not self._begun and self._role == "assistant" and not metadata
        header = "" if plain else f"<|{self._role}|>{metadata}"
        self._gap = "\n" if header else ""
        header = "\n" + header if header and self._shown else header
        message = Message(self._role, metadata, "")
        self._begun.append((message, self._shown, self._shown + len(header)))
        return header


class Answer:
    """Collects the tokens of one row and decides when it ends.

    It may have `limit` tokens and ends at one of the model's `stop_ids`, unless the parameters say
    otherwise (the attribute `stop_ids` has all that end it); its text passes through a
    `Cleaner` (`clean`, `wide`), or is read as messages, each of them cleaned (`roles`).
    `finish_reason` is None until it has ended. UsageError: a stop string can never match.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        limit: int,
        stop_ids: Sequence[int],
        clean: bool,
        roles: bool = False,
        wide: bool = False,
    ):
        for text in sampling.stop if clean else ():
            if (found := replaced(text, wide=wide)) is not None:
                raise UsageError(
                    f"a stop string with {found[0]} can never match",
                    f"An answer has {found[1]} instead of {found[0]}.",
                    "Leave it out.",
                )
        self.prompt_ids, self.limit = tuple(prompt_ids), limit
        ends = () if sampling.ignore_eos else stop_ids
        self.stop_ids = tuple(dict.fromkeys((*ends, *sampling.stop_token_ids)))
        self.finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        self._observation = tokenizer.special.get("<|observation|>")
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if sampling.logprobs is None else []
        self._pieces: list[str] = []
        last = self.prompt_ids[-1]
        plain = partial(PlainText, clean=clean, wide=wide)
        self._text = (RoleText if roles else plain)(tokenizer, last)
        self._stop = StopStrings(sampling.stop, trim=clean)
        self._loop = LoopDetector(sampling.loop_stop)

    def push(self, token: int, logprob: TokenLogprob | None = None) -> str:
        """Take the next token (an end token too) and return the text that is now certain."""
        if token in self.stop_ids:
            self._stop_reason = token
            return self._finish("observation" if token == self._observation else "stop", "")
        self._ids.append(token)
        if self._logprobs is not None and logprob is not None:
            self._logprobs.append(logprob)
        text = self._stop.push(self._text.push(token))
        if self._stop.string:
            return self._finish("stop", text)
        if self._loop.push(token):
            return self._finish("loop", text)
        if len(self._ids) >= self.limit:
            return self._finish("length", text)
        self._pieces.append(text)
        return text

    def completion(self, stats: Stats | None = None) -> Completion:
        """Return the finished answer."""
        assert self.finish_reason is not None
        text = "".join(self._pieces)
        return Completion(
            self.prompt_ids,
            tuple(self._ids),
            text,
            self.finish_reason,
            None if self._logprobs is None else tuple(self._logprobs),
            self._text.messages(text),
            self._stop_reason,
            stats or Stats(),
        )

    def _finish(self, reason: str, text: str) -> str:
        """Release what is held back, which may still complete a stop string."""
        if not self._stop.string:
            text += self._stop.push(self._text.flush())
        if self._stop.string:
            reason, self._stop_reason = "stop", self._stop.string
        else:
            text += self._stop.flush()
        self.finish_reason = reason
        self._pieces.append(text)
        return text
