"""One growing answer on the host: ids to text, stop strings, clean-up, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glm2_jax.detokenizer import Detokenizer
from glm2_jax.tokenizer import Tokenizer
from infer.loops import LoopDetector
from infer.params import SamplingParams

_DATE_MARK, _DATE = "[[训练时间]]", "2023年"


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token drawn, and of the likeliest, under the unfiltered model."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes:
      prompt_ids: what the model read.
      output_ids: what it wrote, without the end token. An answer that a stop string ended has
        all tokens up to the one that completed the string.
      text: the answer, without the stop string and what follows it.
      finish_reason: "stop" (end token or stop string), "length" or "loop" (see `infer.loops`).
      logprobs: one for each of `output_ids`, where asked for.
    """

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None


class StopStrings:
    """Passes text on until one of the strings appears, holding back what may become one."""

    def __init__(self, strings: Sequence[str]):
        self._strings = strings
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Takes new text and returns what is certain not to belong to a stop string."""
        self._held += text
        starts = [at for at in map(self._held.find, self._strings) if at >= 0]
        if starts:
            self.found = True
            return self._cut(min(starts), keep=False)
        return self._cut(len(self._held) - _overlap(self._held, self._strings))

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        return self._cut(len(self._held))

    def _cut(self, at: int, *, keep: bool = True) -> str:
        text, self._held = self._held[:at], self._held[at:] if keep else ""
        return text


class Cleaner:
    """`clean_response` for text that comes in pieces: the pieces joined equal its result."""

    def __init__(self) -> None:
        self._held = ""
        self._started = False

    def push(self, text: str) -> str:
        """Takes new text; returns what is certain to be in the cleaned answer."""
        held = (self._held + text).replace(_DATE_MARK, _DATE)
        if not self._started:
            held = held.lstrip()
        end = len(held) - _overlap(held, (_DATE_MARK,))
        if end == len(held):  # white space may turn out to be the end of the answer
            end = len(held.rstrip())
        self._held = held[end:]
        self._started = self._started or end > 0
        return held[:end]

    def flush(self) -> str:
        """What was held back and belongs to the answer."""
        return self._held.rstrip()


def _overlap(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `strings` without being all of it."""
    longest = max((len(string) - 1 for string in strings), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(size < len(string) and string.startswith(tail) for string in strings):
            return size
    return 0


class Answer:
    """Collects the tokens of one row and decides when it ends.

    Attributes:
      finish_reason: None while the answer goes on.
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
    ):
        self.prompt_ids = tuple(prompt_ids)
        self.limit = limit
        self.finish_reason: str | None = None
        self._stop_ids = stop_ids
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if sampling.logprobs is None else []
        self._pieces: list[str] = []
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(sampling.stop)
        self._cleaner = Cleaner() if clean else None
        self._loop = LoopDetector(sampling.loop_stop)

    def push(self, token: int, logprob: TokenLogprob | None = None) -> str:
        """Takes the next token (an end token too) and returns the text that is now certain."""
        if token in self._stop_ids:
            return self._finish("stop", "")
        self._ids.append(token)
        if self._logprobs is not None and logprob is not None:
            self._logprobs.append(logprob)
        text = self._stop.push(self._detokenizer.push(token))
        if self._stop.found:
            return self._finish("stop", text)
        if self._loop.push(token):
            return self._finish("loop", text)
        if len(self._ids) >= self.limit:
            return self._finish("length", text)
        return self._emit(text)

    @property
    def drawn(self) -> int:
        """Tokens so far, without the end token."""
        return len(self._ids)

    def completion(self) -> Completion:
        """The finished answer."""
        assert self.finish_reason is not None
        return Completion(
            self.prompt_ids,
            tuple(self._ids),
            "".join(self._pieces),
            self.finish_reason,
            None if self._logprobs is None else tuple(self._logprobs),
        )

    def _finish(self, reason: str, text: str) -> str:
        """Releases what is held back; the last bytes may still complete a stop string."""
        if not self._stop.found:
            text += self._stop.push(self._detokenizer.flush())
        if self._stop.found:
            reason = "stop"
        else:
            text += self._stop.flush()
        self.finish_reason = reason
        return self._emit(text, last=True)

    def _emit(self, text: str, *, last: bool = False) -> str:
        if self._cleaner is not None:
            text = self._cleaner.push(text) + (self._cleaner.flush() if last else "")
        self._pieces.append(text)
        return text
