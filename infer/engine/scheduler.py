"""The schedule of a call: which program runs when, and who gets what comes of it.

It is the simplest schedule of rows: all begin together, and the call ends with the last of them.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from typing import cast

import jax
import numpy as np

from glm2_jax import KVCache
from glm2_jax.runtime.devices import device_errors
from infer.engine.answer import Completion
from infer.engine.call import Batch, columns_of
from infer.engine.drafts import Drafts
from infer.engine.executor import Executor
from infer.engine.rows import Row, TokenEvent
from infer.engine.sampling import Array
from infer.engine.steps import Controls, Output, State, Stepped
from infer.memory.shortage import when_answering

Stage = tuple[State, list[TokenEvent]]


class Scheduler:
    """Answers the rows of one batch; each step drafts and verifies `draft` tokens, 0 = off; drafted
    by the configuration's idea, or taken from the text."""

    def __init__(self, executor: Executor, batch: Batch, *, draft: int = 0, by_idea: bool = False):
        self.batch, self._draft, self._by_idea = batch, draft, by_idea
        # A session reads all prompts into a cache that was made before: those after the first then
        # need no other programs.
        self._separate_cache = batch.reused is not None
        self._executor = executor.counting()
        self._called = self._prefill_called = 0.0

    def events(self) -> Generator[TokenEvent, None, None]:
        """Answer step by step."""
        for _, events in self.steps():
            yield from events

    def complete(self) -> list[Completion]:
        """Answer, and return the complete answers."""
        for _ in self.steps():
            pass
        return [row.completion() for row in self.batch.rows]

    def steps(self, cache: KVCache | None = None) -> Iterator[Stage]:
        """Answer step by step, yielding each step's events and the newest state.

        Each step is dispatched before the one before it is read, so that the device does not wait
        for the host. So the state may be a step ahead of the events; the next step uses it up.
        The `cache`, which is used up, has the ids that the batch reuses; None = a new one.
        """
        with self._device_errors():
            self._compile(cache)
            state, output = self._prefill(self._executor, cache)
            if self._draft:
                yield from self._drafted_steps(state, output)
                return
            dispatched, pending = 1, output
            while pending is not None:
                following = None
                if dispatched < self.batch.steps_wanted:
                    state, following = self._step(self._executor, state, dispatched)
                    dispatched += 1
                events = self._take(pending)
                yield state, events
                pending = following if self.batch.going else None

    def _drafted_steps(self, state: State, output: Output) -> Iterator[Stage]:
        """As `steps`, but each step waits for the tokens of the one before: they make the draft."""
        batch = self.batch
        drafts = Drafts([row.ids for row in batch.rows], self._draft)
        events = self._take(output)
        while True:
            drafts.push(events)
            yield state, events
            rows = batch.going
            if not rows:
                return
            if self._by_idea:
                state, found = self._executor.draft(batch.keep, state)
            else:
                found = drafts.next(batch.keep)
            state, output = self._step(self._executor, state, batch.drawn, drafts=found)
            events = self._take(output)
            for row in rows:
                row.stats.passes += 1
                row.stats.drafted_tokens += 0 if found is None else self._draft
                row.stats.accepted_tokens = row.stats.decode_tokens - row.stats.passes

    def _compile(self, cache: KVCache | None = None) -> None:
        """Compile, ahead of all work, the programs that the rows begin with."""
        batch = self.batch
        decodes = batch.steps_wanted > 1
        self._called = time.perf_counter()

        def begin(executor: Executor) -> None:
            state, _ = self._prefill(executor, cache)
            if decodes and not self._by_idea:
                self._step(executor, state, 1)
            if decodes and self._draft:
                drafts = np.zeros((batch.size, self._draft), np.int32)
                if self._by_idea:
                    state, _ = executor.draft(batch.keep, state)
                self._step(executor, state, 1, drafts=drafts)

        widths = tuple(part.tokens.shape for part in batch.parts)
        room = batch.cache_size if cache is None else self._executor.room(cache)
        sizes = (room if self._separate_cache else 0, batch.cache_size, batch.largest_cache)
        self._executor.compile_ahead((widths, sizes, decodes, self._draft), begin)
        self._prefill_called = self._seconds()

    @cached_property
    def _controls(self) -> Controls:
        return self._executor.places.put(self.batch.controls)

    def _prefill(self, executor: Executor, cache: KVCache | None = None) -> Stepped:
        """Read the prompts and draw the first tokens."""
        batch = self.batch
        asked = batch.counts, self._controls
        if cache is None:
            if len(batch.parts) == 1 and not self._separate_cache:
                return self._sent(executor.prefill(batch.parts[0], batch.cache_size, *asked))
            cache = executor.new_cache(batch.size, batch.cache_size)
        cache = executor.grow(cache, batch.cache_size, batch.largest_cache)
        *full, last = batch.parts
        for part in full:
            cache = executor.read(part, cache)
        return self._sent(executor.extend(last, *asked, cache))

    def _step(
        self,
        executor: Executor,
        state: State,
        drawn: int,
        *,
        drafts: Array | None = None,
    ) -> Stepped:
        """Take one step after `drawn` tokens of each row; the state is used up."""
        batch, width = self.batch, 1 if drafts is None else drafts.shape[1] + 1
        cache = cast(KVCache, state.cache)
        cache = executor.grow(cache, batch.slots(drawn + width), batch.largest_cache)
        state = state._replace(cache=cache)
        return self._sent(executor.decode(self._controls, batch.keep, state, drafts=drafts))

    def _sent(self, stepped: Stepped) -> Stepped:
        """Start copying to the host: tokens, and log-probabilities if a row wants them."""
        state, output = stepped
        if not self.batch.controls.want_logprobs.any():
            output = output._replace(logprobs=None)
        for array in jax.tree.leaves(output):
            if isinstance(array, jax.Array):  # not a shape that is traced
                array.copy_to_host_async()
        return state, output

    def _take(self, output: Output) -> list[TokenEvent]:
        """Hand the output of a step, or of several together, to the rows."""
        output, rows = jax.device_get(output), self.batch.going
        events = [event for column in columns_of(output) for event in self.batch.take(column)]
        now = self._seconds()
        for row in rows:
            self._count(row, now)
        return events

    def _count(self, row: Row, now: float) -> None:
        """Bring the statistics of a row up to date."""
        stats, made = row.stats, self._executor.made
        if not stats.prefill_tokens:
            stats.reused_tokens = self.batch.reused or 0
            stats.prefill_tokens = len(row.ids) - stats.reused_tokens
            stats.first_token_s, stats.prefill_s = now, now - self._prefill_called
        stats.decode_tokens, stats.decode_s = row.tokens - 1, now - stats.first_token_s
        stats.compile_s = made.seconds
        stats.programs, stats.programs_kept = made.programs, made.kept

    def _seconds(self) -> float:
        """Return seconds since the call began, without those of compiling."""
        return time.perf_counter() - self._called - self._executor.made.seconds

    def _device_errors(self) -> AbstractContextManager[None]:
        """Return the context in which an out-of-memory error reports what the batch needs."""
        batch, executor = self.batch, self._executor
        longest = max(len(row.ids) for row in batch.rows)
        prompts = f"a prompt of {longest} tokens"
        if batch.size > 1:
            prompts = f"{batch.size} rows, prompts of up to {longest} tokens"
        what = f"{prompts}, a cache of {batch.largest_cache} slots"
        return device_errors(
            what,
            lambda: when_answering(
                executor.config,
                executor.params,
                executor.device,
                context=batch.largest_cache,
                batch=batch.size,
                chunk=batch.chunk,
                columns=1 + self._draft,
                kv=executor.kv,
            ),
        )
