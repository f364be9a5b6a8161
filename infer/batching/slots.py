"""The device's side of continuous batching: a fixed batch of slots, and what is done to them.

B slots, R rows of a prefill, T its width, V vocabulary. Every program takes the state where the one
before left it, and the device runs programs in order. So nothing waits for the host: a slot may be
given to the next sequence while the step that ends the one before is still running.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from glm2_jax.lora import is_joined
from infer.batching.options import BatchOptions
from infer.batching.queue import Ticket
from infer.batching.scheduler import Decode, Part, Prefill
from infer.engine import steps
from infer.engine.call import controls_of
from infer.engine.executor import Executor
from infer.engine.rows import Row
from infer.engine.sampling import Logprobs, prompt_counts
from infer.engine.steps import Controls, Output, State, Stepped


class Sent(NamedTuple):
    """A program that was dispatched: what comes of it, and for whom."""

    prefill: bool
    drawn: list[tuple[int, Ticket]]  # index in the output, and whose token it is
    output: Output
    scored: Ticket | None = None  # whose prompt has log-probabilities
    logprobs: Logprobs | None = None  # [T], of the prompt's next tokens


class Slots:
    """The slots on the device, and what their rows ask for."""

    def __init__(self, executor: Executor, options: BatchOptions):
        self.executor, self.options, self.count = executor, options, options.slots
        self.reset()

    def reset(self) -> None:
        """Make all slots empty; also after an error of the device."""
        self._state = self._empty(self.executor)
        self._rows = [None] * self.count
        self._controls: Controls | None = None  # on the device; None = to be made of the rows

    def prefill(self, plan: Prefill) -> list[Sent]:
        """Read parts of prompts into their slots, and draw the first tokens of those that end.

        Prompts whose tokens are scored are read one by one.
        """
        scored = [part for part in plan.parts if part.ticket.payload.score_prompt is not None]
        others = [part for part in plan.parts if part not in scored]
        sent = [self._prefill([part], self.options.budget, plan.view) for part in scored]
        return [*sent, self._prefill(others, plan.width, plan.view)] if others else sent

    def decode(self, plan: Decode, drafts: np.ndarray | None = None) -> Sent:
        """Take a step: a token for each row that takes part, or as many as agree with the drafts.

        `drafts` is int32 [B, N].
        """
        if self._controls is None:
            rows = [row or self._idle for row in self._rows]
            self._controls = self.executor.places.put(controls_of(rows, self.count))
        keep = np.array([ticket is not None for ticket in plan.tickets])
        self._state, output = self._step(
            self.executor, self._state, self._controls, keep, plan.view, drafts
        )
        drawn = [(slot, ticket) for slot, ticket in enumerate(plan.tickets) if ticket is not None]
        return _copied(Sent(False, drawn, output))

    def compile_ahead(self) -> None:
        """Compile all programs: prefills, with scores and without, and steps, for all views."""
        options = self.options
        shapes = [(1, width) for width in options.widths]
        shapes += [(options.rows(width), width) for width in options.widths]

        def begin(executor: Executor) -> None:
            state, keep = self._empty(executor), np.ones(self.count, bool)
            controls = executor.places.put(controls_of([], self.count))
            for view in options.views:
                self._step(executor, state, controls, keep, view)
                for rows, width in dict.fromkeys(shapes):
                    part = _no_part(rows, width)
                    self._read(executor, state, part, np.zeros(rows, np.int32), keep[:1], [], view)
                self._score(executor, state, _no_part(1, options.budget), ...)

        self.executor.compile_ahead(("slots", options), begin)
