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

from infer.batching.options import BatchOptions
from infer.batching.queue import Ticket
from infer.batching.scheduler import Decode, Prefill
from infer.engine.call import controls_of, prompt_counts
from infer.engine.executor import Executor
from infer.engine.rows import Row
from infer.engine.sampling import Logprobs
from infer.engine.steps import Controls, Output, Part, State, Stepped


class Sent(NamedTuple):
    """A program that was dispatched: what comes of it, and for whom."""

    prefill: bool
    drawn: list[tuple[int, Ticket]]  # index in the output, and whose token it is
    output: Output | None  # None: nothing is drawn
    scored: list[tuple[int, Ticket, int]]  # index, whose prompt, how many of its tokens
    logprobs: Logprobs | None  # [R, T], of the next tokens of the prompts; None: not wanted


class Reading(NamedTuple):
    """A part of some prompts as the programs take it."""

    part: Part
    slots: np.ndarray  # int32 [R]; B = no slot: an empty row
    following: np.ndarray | None  # int32 [R, T], the tokens to score; None: not wanted
    first: np.ndarray  # bool [R], which rows draw their first token


class Slots:
    """The slots on the device, and what their rows ask for."""

    def __init__(self, executor: Executor, options: BatchOptions, stop_ids: Sequence[int]):
        self.executor, self.options, self.count = executor, options, options.slots
        self._stop_ids, self._vocab = stop_ids, executor.config.vocab_size
        self.reset()

    def reset(self) -> None:
        """Make all slots empty; also after an error of the device."""
        self._state = self._empty(self.executor)
        self._rows: list[Row | None] = [None] * self.count
        self._controls: Controls | None = None  # on the device; None = to be made of the rows

    def prefill(self, plan: Prefill) -> Sent:
        """Read parts of prompts into their slots, and draw the first tokens of those that end."""
        reading = self._reading(plan)
        ends = [(index, part) for index, part in enumerate(plan.parts) if part.last]
        asked = [part.ticket.payload.row for part in plan.parts]
        for _, part in ends:
            self._rows[part.slot], self._controls = part.ticket.payload.row, None
        self._state, output, logprobs = self._read(
            self.executor, self._state, reading, plan.view, asked
        )
        return _copied(
            Sent(
                True,
                [(index, part.ticket) for index, part in ends],
                output,
                [
                    (index, part.ticket, len(part.ids))
                    for index, part in enumerate(plan.parts)
                    if part.ticket.payload.score_prompt is not None
                ],
                logprobs,
            )
        )

    def decode(self, plan: Decode) -> Sent:
        """Take a step: one token for each row that takes part."""
        keep = np.array([ticket is not None for ticket in plan.tickets])
        if self._controls is None:
            controls = controls_of(self._rows, self.count, self._stop_ids)
            self._controls = self.executor.places.put(controls)
        self._state, output = self._step(self.executor, self._state, keep, plan.view)
        tickets = [(slot, ticket) for slot, ticket in enumerate(plan.tickets) if ticket is not None]
        return _copied(Sent(False, tickets, output, [], None))

    def compile_ahead(self) -> None:
        """Compile all programs: prefills, with scores and without, and steps, for all views."""
        shapes, views = self.options.shapes, self.options.views

        def begin(executor: Executor) -> None:
            state = self._empty(executor)
            for view in views:
                self._step(executor, state, np.ones(self.count, bool), view)
                for rows, width in shapes:
                    if width > view:
                        continue
                    tokens = np.zeros((rows, width), np.int32)
                    none = np.zeros(rows, np.int32)
                    part, first = Part(tokens, none, none), np.ones(rows, bool)
                    for following in (None, tokens):
                        self._read(executor, state, Reading(part, none, following, first), view, [])

        self.executor.compile_ahead(("slots", self.options), begin)

    def _empty(self, executor: Executor) -> State:
        cache = executor.new_cache(self.count, self.options.size)
        none = np.zeros(self.count, np.int32)
        counts = np.zeros((self.count, self._vocab), np.int16)
        rest = executor.places.put((none, counts, none.astype(bool), none.copy()))
        return State(cache, *rest)

    def _reading(self, plan: Prefill) -> Reading:
        rows = self.options.rows(plan.width)
        tokens, following = np.zeros((2, rows, plan.width), np.int32)
        lengths, starts = np.zeros((2, rows), np.int32)
        slots, first = np.full(rows, self.count, np.int32), np.zeros(rows, bool)
        for index, part in enumerate(plan.parts):
            tokens[index, : len(part.ids)] = part.ids
            after = part.ticket.prompt[part.start + 1 :][: len(part.ids)]
            following[index, : len(after)] = after
            lengths[index], starts[index] = len(part.ids), part.start
            slots[index], first[index] = part.slot, part.last
        scores = any(part.ticket.payload.score_prompt is not None for part in plan.parts)
        return Reading(Part(tokens, lengths, starts), slots, following if scores else None, first)

    def _read(
        self,
        executor: Executor,
        state: State,
        reading: Reading,
        view: int,
        rows: Sequence[Row],
    ) -> tuple[State, Output | None, Logprobs | None]:
        part, slots, following, first = reading
        count = len(slots)
        logits, logprobs, cache = executor.fill(part, slots, state.cache, view, following)
        state = state._replace(cache=cache)
        if not first.any():
            return state, None, logprobs
        none = np.zeros(count, np.int32)
        counts = prompt_counts([row.ids for row in rows], count, self._vocab)
        controls = controls_of(rows, count, self._stop_ids)
        begun, output = executor.pick(logits, controls, State(None, none, counts, first, none))
        slots = np.where(first, slots, self.count).astype(np.int32)
        return executor.insert(slots, begun, state), output, logprobs

    def _step(self, executor: Executor, state: State, keep: np.ndarray, view: int) -> Stepped:
        controls = self._controls or controls_of([], self.count, self._stop_ids)
        logits, state = executor.decode(keep, state, view=view)
        return executor.pick(logits, controls, state)


def _copied(sent: Sent) -> Sent:
    """Start copying to the host what is read there."""
    for array in jax.tree.leaves((sent.output, sent.logprobs)):
        array.copy_to_host_async()
    return sent
