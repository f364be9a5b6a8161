"""A request on its way through the slots: its row, and who listens to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from glm2_jax.errors import GLMError
from infer.batching.grammar import Matcher
from infer.batching.queue import Ticket
from infer.engine.answer import TokenLogprob
from infer.engine.drafts import Text
from infer.engine.rows import Row, TokenEvent


class Busy(GLMError):
    """The queue is full, or the worker is stopping; `retry_after` is in seconds."""

    def __init__(self, what: str, why: str = "", fix: str = "", *, retry_after: float = 1.0):
        super().__init__(what, why, fix)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Failure:
    """The last event of a job that has no complete answer.

    `reason` is "cancelled", "deadline", "not_finite" (NaN or Inf in the logits of this row),
    "grammar" (its schema can no longer be enforced), "stopping" or "device".
    """

    reason: str
    error: GLMError


Event = TokenEvent | Failure


@dataclass(eq=False)
class Job:
    """One row and its listener.

    Attributes:
        row: ids, sampling parameters, answer and statistics (`stats.reused_tokens` is the part of
            the prompt that was in the cache already).
        listener: called with each event, on the worker's thread, in order; the last is a
            `TokenEvent` with a `finish_reason`, or a `Failure`. It must return at once.
        client: whose it is; clients take turns in the queue.
        deadline: of `time.monotonic()`; when it has passed the job ends with a `Failure`.
        adapter: number of the LoRA adapter, 0 = the base model.
        score_prompt: how many alternatives are wanted with the log-probability of each prompt
            token; None = not wanted. `prompt_logprobs` has them from the first event on, one for
            each token after the first.
        grammar: what the answer has to match; None = it is free.
    """

    row: Row
    listener: Callable[[Event], None]
    client: str = ""
    deadline: float | None = None
    adapter: int = 0
    score_prompt: int | None = None
    grammar: Matcher | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    arrived: float = 0.0  # of `time.monotonic()`
    ticket: Ticket | None = None  # of the scheduler, once it is submitted
    text: Text | None = None  # where drafts come from
