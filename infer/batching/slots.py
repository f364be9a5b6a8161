"""The device's side of continuous batching: a fixed batch of slots, and what is done to them.

B slots, R rows of a prefill, T its width, V vocabulary. Every program takes the state where the one
before left it, and the device runs programs in order. So nothing waits for the host: a slot may be
given to the next sequence while the step that ends the one before is still running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import numpy as np

from glm2_jax import KVCache
from glm2_jax.lora import is_joined
from infer.batching.job import Job
from infer.batching.options import BatchOptions
from infer.batching.queue import Ticket
from infer.batching.scheduler import Decode, Part, Prefill
from infer.engine import steps
from infer.engine.call import controls_of
from infer.engine.executor import Executor
from infer.engine.sampling import EVERY, Logprobs, prompt_counts
from infer.engine.steps import Controls, Output, State

_FEW = (1, 4)  # rows of the smaller steps


class Sent(NamedTuple):
    """A program that was dispatched: what comes of it, and for whom."""

    prefill: bool
    drawn: list[tuple[int, Ticket]]  # index in the output, and whose token it is
    output: Output | None  # None: nothing is drawn
    scored: list[tuple[int, Ticket, int]] = []  # index, whose prompt, how many of its tokens
    logprobs: Logprobs | None = None  # [R, T], of the prompts' next tokens


class Slots:
    """The slots on the device, and what their rows ask for.

    `rows_of` says how many rows a prefill of a width has, where it has several.
    """

    def __init__(self, executor: Executor, options: BatchOptions, rows_of: Callable[[int], int]):
        self._executor, self._options, self._count = executor, options, options.slots
        self._rows_of = rows_of
        self._vocab, self._joined = executor.config.vocab_size, is_joined(executor.params)
        # A step of few rows computes only those, unless shapes must not depend on the others.
        few = () if options.deterministic else _FEW
        self._few = [size for size in few if size < self._count]
        self._all_allowed = {
            size: executor.places.put(self._allowed([None] * size))
            for size in (*self._few, self._count)
        }
        self.reset()

    def reset(self) -> None:
        """Make all slots empty; also after an error of the device."""
        self._state = self._empty(self._executor)
        self._all: tuple[Ticket | None, ...] = (None,) * self._count
        self._ask(self._all)

    def prefill(self, plan: Prefill) -> list[Sent]:
        """Read parts of prompts into their slots, and draw the first tokens of those that end.

        Prompts whose tokens are scored are read one by one, in the largest shapes.
        """
        options, sent = self._options, []
        scored = [part for part in plan.parts if part.ticket.payload.score_prompt is not None]
        for part in scored:
            sent.append(self._read([part], 1, options.widths[-1], options.size))
        if others := [part for part in plan.parts if part not in scored]:
            rows = 1 if len(others) == 1 else self._rows_of(plan.width)
            sent.append(self._read(others, rows, plan.width, plan.view))
        return sent

    def decode(self, plan: Decode, drafts: np.ndarray | None = None) -> Sent:
        """Take a step: a token for each row that takes part, or as many as agree with the drafts.

        `drafts` is int32 [B, N].
        """
        taking = [(slot, ticket) for slot, ticket in enumerate(plan.tickets) if ticket is not None]
        size = next((n for n in self._few if drafts is None and n >= len(taking)), self._count)
        if size < self._count:
            drawn = [(row, ticket) for row, (_, ticket) in enumerate(taking)]
            asked = (*(ticket for _, ticket in taking), *(None,) * (size - len(taking)))
            rows, keep = np.full(size, self._count, np.int32), np.ones(size, bool)
            rows[: len(taking)] = [slot for slot, _ in taking]
        else:
            drawn, rows = taking, None
            asked = tuple(  # those who sit out a step keep their place
                ticket or (before if before and before.slot == slot else None)
                for slot, (ticket, before) in enumerate(zip(plan.tickets, self._all, strict=True))
            )
            self._all, keep = asked, np.array([one is not None for one in plan.tickets])
        if asked != self._asked:
            self._ask(asked)
        how = {"view": plan.view, "adapters": self._adapters, "drafts": drafts, "rows": rows}
        jobs = _jobs(plan.tickets if rows is None else asked)
        bound = any(job is not None and job.grammar is not None for job in jobs)
        how["allowed"] = self._allowed(jobs) if bound else self._all_allowed[size]
        self._state, output = self._executor.decode(self._controls, keep, self._state, **how)
        return _copied(Sent(False, drawn, output))

    def warm(self) -> None:
        """Compile all programs ahead, and run each of them once without any row: the first run of a
        program is slower than the others."""
        self._executor.compile_ahead(("slots", self._options), self._run_all)
        self._state = self._run_all(self._executor, self._state)
        jax.block_until_ready(self._state)

    def _run_all(self, executor: Executor, state: State | None = None) -> State:
        """Run prefills, with scores and without, and steps, for all views; no slot is written."""
        options, state = self._options, state or self._empty(executor)
        sizes = {(n, width) for width in options.widths for n in (1, self._rows_of(width))}
        for view in options.views:
            for size, allowed in self._all_allowed.items():
                idle = [None] * size
                controls, none = executor.places.put(_controls(idle)), np.zeros(size, bool)
                rows = None if size == self._count else np.full(size, self._count, np.int32)
                how = {"adapters": self._numbers(idle), "allowed": allowed, "rows": rows}
                state, _ = executor.decode(controls, none, state, view=view, **how)
            for rows, width in sorted(sizes):
                empty = _Reading.empty(rows, width, self._count)
                state, _, _ = self._begin(executor, state, empty, view)
        scored = _Reading.empty(1, options.widths[-1], self._count)
        scored = scored._replace(following=scored.part.tokens)
        return self._begin(executor, state, scored, options.size)[0]

    def _ask(self, tickets: tuple[Ticket | None, ...]) -> None:
        """Put on the device what these tickets ask for, which stay in their slots for a while."""
        self._asked, jobs = tickets, _jobs(tickets)
        self._controls = self._executor.places.put(_controls(jobs))
        self._adapters = self._numbers(jobs)

    def _empty(self, executor: Executor) -> State:
        cache = executor.new_cache(self._count, self._options.size)
        none = np.zeros(self._count, np.int32)
        counts = np.zeros((self._count, self._vocab), np.int16)
        rest = executor.places.put((none, counts, none.astype(bool), none))
        return State(cache, *rest)

    def _read(self, parts: Sequence[Part], rows: int, width: int, view: int) -> Sent:
        reading = _Reading.of(parts, rows, width, empty=self._count)
        self._state, output, logprobs = self._begin(self._executor, self._state, reading, view)
        indexed = list(enumerate(parts))
        drawn = [(index, part.ticket) for index, part in indexed if part.last]
        scored = [(index, part.ticket, len(part.ids)) for index, part in indexed if logprobs]
        return _copied(Sent(True, drawn, output, scored, logprobs))

    def _begin(
        self, executor: Executor, state: State, reading: _Reading, view: int
    ) -> tuple[State, Output | None, Logprobs | None]:
        """Read parts, draw the first tokens and put the rows that have one into the state."""
        part, slots, following, ends, jobs = reading
        where = {"view": view, "adapters": self._numbers(jobs)}
        cache = cast(KVCache, state.cache)
        if following is None:
            (logits, cache), logprobs = executor.fill(part, slots, cache, **where), None
        else:
            logits, logprobs, cache = executor.score(part, following, slots, cache, **where)
        state = state._replace(cache=cache)
        if not ends.any():
            return state, None, logprobs
        prompts = [() if job is None else job.row.ids for job in jobs]
        counts = prompt_counts(prompts, len(slots), self._vocab)
        begun = State.first(part, counts)
        controls, allowed = _controls(jobs), self._allowed(jobs)
        begun, output = executor.pick((logits, cache), controls, ends, begun, allowed)
        slots = np.where(ends, slots, self._count).astype(np.int32)
        return executor.insert(slots, begun, state), output, logprobs

    def _allowed(self, jobs: Sequence[Job | None]) -> np.ndarray:
        """Return which tokens the rows may draw next, uint32 [rows, V / 32]."""
        allowed = np.full((len(jobs), -(-self._vocab // 32)), EVERY)
        for row, job in enumerate(jobs):
            if job is not None and job.grammar is not None:
                allowed[row] = job.grammar.allowed
        return allowed

    def _numbers(self, jobs: Sequence[Job | None]) -> np.ndarray | None:
        """Return the adapters of rows, int32; None where the model has none."""
        numbers = [0 if job is None else job.adapter for job in jobs]
        return np.array(numbers, np.int32) if self._joined else None


class _Reading(NamedTuple):
    """Parts of prompts as the programs take them, R rows of T tokens."""

    part: steps.Part
    slots: np.ndarray  # int32 [R]; B = an empty row
    following: np.ndarray | None  # int32 [R, T], the tokens that are scored; None: not wanted
    ends: np.ndarray  # bool [R], whose prompt ends here
    jobs: list[Job | None]  # of the rows

    @classmethod
    def empty(cls, rows: int, width: int, slot: int) -> _Reading:
        none = np.zeros(rows, np.int32)
        part = steps.Part(np.zeros((rows, width), np.int32), none, none.copy())
        return cls(part, np.full(rows, slot, np.int32), None, none == 0, [None] * rows)

    @classmethod
    def of(cls, parts: Sequence[Part], rows: int, width: int, *, empty: int) -> _Reading:
        reading = cls.empty(rows, width, empty)
        reading.ends[:] = False
        tokens, lengths, kept = reading.part
        following = np.zeros_like(tokens)
        for index, part in enumerate(parts):
            after = part.ticket.prompt[part.start + 1 :][: len(part.ids)]
            tokens[index, : len(part.ids)], following[index, : len(after)] = part.ids, after
            lengths[index], kept[index], reading.slots[index] = len(part.ids), part.start, part.slot
            reading.ends[index], reading.jobs[index] = part.last, part.ticket.payload
        scores = parts[0].ticket.payload.score_prompt is not None
        return reading._replace(following=following) if scores else reading


def _jobs(tickets: Sequence[Ticket | None]) -> list[Job | None]:
    return [None if ticket is None else ticket.payload for ticket in tickets]


def _controls(jobs: Sequence[Job | None]) -> Controls:
    return controls_of([None if job is None else job.row for job in jobs])


def _copied(sent: Sent) -> Sent:
    """Start copying to the host what is read there."""
    wanted = any(ticket.payload.row.sampling.logprobs is not None for _, ticket in sent.drawn)
    if sent.output is not None and not wanted:
        sent = sent._replace(output=sent.output._replace(logprobs=None))
    for array in jax.tree.leaves((sent.output, sent.logprobs)):
        array.copy_to_host_async()
    return sent
