"""Continuous batching without a thread: runs what the scheduler plans, and hands out the tokens."""

from __future__ import annotations

import dataclasses
import time
import traceback
from contextlib import AbstractContextManager
from functools import partial

import jax

from glm2_jax.errors import CheckpointError, DeviceError, GLMError, InputError
from glm2_jax.runtime.devices import device_errors
from infer.batching.job import Event, Failure, Job
from infer.batching.options import BatchOptions
from infer.batching.queue import Ticket
from infer.batching.scheduler import Decode, Prefill, Scheduler
from infer.batching.slots import Sent, Slots
from infer.engine.answer import TokenLogprob
from infer.engine.call import columns_of
from infer.engine.drafts import Text, drafts_of
from infer.engine.engine import Engine
from infer.engine.sampling import Logprobs
from infer.engine.stats import Stats
from infer.engine.steps import IDLE
from infer.memory.shortage import when_answering


class Batcher:
    """Answers jobs in the slots of one batch; for one thread.

    Each program is dispatched before the tokens of the one before are read, so that the device does
    not wait for the host.

    Attributes:
        ended: how many jobs had their last event.
        answer_s: mean seconds of recent answers, from their first token on.
        stats: tokens and seconds of all rows together.
    """

    def __init__(self, engine: Engine, options: BatchOptions):
        options = dataclasses.replace(options, whole=engine.config.block.bidirectional)
        self.options, self.stats, self._draft = options, Stats(), engine.speculate
        self.ended, self.answer_s = 0, 0.0
        self.scheduler = self._new_scheduler()
        self._executor = engine.executor.counting()
        with self._device_errors():
            self._slots = Slots(self._executor, options, self.scheduler.rows_of)
        self._jobs: set[Job] = set()  # those that have not ended
        self._sent: list[Sent] = []  # what was dispatched and not read

    def _new_scheduler(self) -> Scheduler:
        options = self.options
        return Scheduler(
            slots=options.slots,
            size=options.size,
            budget=options.budget,
            widths=options.widths,
            views=options.views,
            queue=options.slots + options.queue,  # a free slot is taken at the next step
            deterministic=options.deterministic,
            eager=options.eager,
            whole=options.whole,
        )

    def warm(self) -> None:
        """Compile all programs ahead, and run each of them once."""
        with self._device_errors():
            self._slots.warm()

    @property
    def open(self) -> int:
        """How many jobs were submitted and have not ended."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Put a job into the queue. QueueFull: as many wait as may."""
        job.arrived, row = time.monotonic(), job.row
        job.ticket = Ticket(
            tuple(row.ids),
            row.answer.limit,
            job.client,
            job.deadline,
            job.adapter,
            reuse=job.score_prompt is None,
            waits=job.grammar is not None,
            payload=job,
        )
        job.text = Text(row.ids) if self._draft else None
        self.scheduler.submit(job.ticket)
        self._jobs.add(job)

    def cancel(self, job: Job) -> None:
        """End a job, unless it has ended."""
        if job in self._jobs:
            self._fail(job, Failure("cancelled", GLMError("the request was cancelled")))

    def step(self) -> bool:
        """Dispatch what is to do next, and hand out the tokens of what was dispatched before.

        Returns whether there was anything to do.
        """
        start, made = time.monotonic(), self._executor.made.seconds
        for ticket in self.scheduler.expired(start):
            self._fail(ticket.payload, Failure("deadline", GLMError("the request took too long")))
        plan, before = self.scheduler.next(), self._sent
        try:
            with self._device_errors():
                self._sent = self._dispatch(plan)
                if self._draft:  # the next drafts depend on these tokens
                    before, self._sent = [*before, *self._sent], []
                for sent in before:
                    self._take(sent)
        except DeviceError as error:
            self.end_all(Failure("device", error))
        waited = time.monotonic() - start - (self._executor.made.seconds - made)
        if before and before[0].prefill:
            self.stats.prefill_s += waited
        else:
            self.stats.decode_s += waited
        return plan is not None or bool(before)

    def _dispatch(self, plan: Prefill | Decode | None) -> list[Sent]:
        if plan is None:
            return []
        if isinstance(plan, Prefill):
            return self._slots.prefill(plan)
        if not self._draft:
            return [self._slots.decode(plan)]
        jobs = [None if ticket is None else ticket.payload for ticket in plan.tickets]
        free = not any(job and job.grammar for job in jobs)
        drafts = drafts_of([job and job.text for job in jobs], self._draft) if free else None
        self.stats.passes += 1
        for job in filter(None, jobs):
            job.row.stats.passes += 1
            job.row.stats.drafted_tokens += 0 if drafts is None else self._draft
        return [self._slots.decode(plan, drafts)]

    def end_all(self, failure: Failure) -> None:
        """End all jobs, and forget what the slots hold: an error may have lost the cache."""
        for job in list(self._jobs):
            self._fail(job, failure)
        self._sent, self.scheduler = [], self._new_scheduler()
        self._slots.reset()

    def _take(self, sent: Sent) -> None:
        """Read what was drawn, and hand it out."""
        output, logprobs = jax.device_get((sent.output, sent.logprobs))
        for index, ticket, count in sent.scored:
            if ticket.payload in self._jobs:
                _score(ticket.payload, jax.tree.map(lambda x, i=index, n=count: x[i, :n], logprobs))
        for step in columns_of(output) if output is not None else []:
            for index, ticket in sent.drawn:
                if ticket.payload in self._jobs and step.tokens[index] != IDLE:
                    found = step.logprobs and [array[index] for array in step.logprobs]
                    self._draw(ticket, int(step.tokens[index]), found)

    def _draw(self, ticket: Ticket, token: int, logprobs: list | None) -> None:
        job: Job = ticket.payload
        try:
            event = job.row.take(token, logprobs)
            if job.grammar is not None and not job.row.ended:
                job.grammar.take(token)
        except CheckpointError as error:  # NaN or Inf: the keys of this row are worth nothing
            self._fail(job, Failure("not_finite", error), forget=True)
            return
        except InputError as error:
            self._fail(job, Failure("grammar", error))
            return
        self.scheduler.drew(ticket, token)
        if job.text is not None and event.token is not None:
            job.text.push(event.token)
        self._count(job, ticket.reused)
        if job.row.ended:
            self.scheduler.end(ticket)
        self._tell(job, event)

    def _fail(self, job: Job, failure: Failure, *, forget: bool = False) -> None:
        assert job.ticket is not None
        self.scheduler.end(job.ticket, forget=forget)
        self._tell(job, failure)

    def _tell(self, job: Job, event: Event) -> None:
        """Hand an event to a job's listener; one that fails must not stop the others."""
        if isinstance(event, Failure) or event.completion is not None:
            self._jobs.discard(job)
            self.ended += 1
            if not isinstance(event, Failure):
                self.answer_s += (job.row.stats.decode_s - self.answer_s) / min(self.ended, 16)
            self.stats.drafted_tokens += job.row.stats.drafted_tokens
            self.stats.accepted_tokens += job.row.stats.accepted_tokens
        try:
            job.listener(event)
        except Exception:
            traceback.print_exc()

    def _count(self, job: Job, reused: int) -> None:
        """Bring the statistics of a row, and of all, up to date."""
        row, all_, seconds = job.row.stats, self.stats, time.monotonic() - job.arrived
        if job.row.tokens == 1:
            row.reused_tokens, row.prefill_tokens = reused, len(job.row.ids) - reused
            row.first_token_s = row.prefill_s = seconds
            all_.first_token_s = all_.first_token_s or seconds
            all_.reused_tokens += reused
            all_.prefill_tokens += row.prefill_tokens
        else:
            all_.decode_tokens += 1
        row.decode_tokens, row.decode_s = job.row.tokens - 1, seconds - row.first_token_s
        row.accepted_tokens = row.decode_tokens - row.passes if self._draft else 0
        made = self._executor.made
        all_.compile_s, all_.programs, all_.programs_kept = made.seconds, made.programs, made.kept

    def _device_errors(self) -> AbstractContextManager[None]:
        """Return the context in which an out-of-memory error reports what the slots need."""
        options, executor = self.options, self._executor
        explain = partial(
            when_answering,
            executor.config,
            executor.params,
            executor.device,
            context=options.size,
            batch=options.slots,
            chunk=max(options.budget, options.widths[-1]),
            columns=1 + self._draft,
            kv=executor.kv,
        )
        return device_errors(f"{options.slots} slots of {options.size} tokens", explain)


def _score(job: Job, logprobs: Logprobs) -> None:
    """Append the log-probabilities of the prompt's tokens that follow those of a part, [count]."""
    if job.score_prompt is None:
        return
    following = job.row.ids[len(job.prompt_logprobs) + 1 :][: len(logprobs.chosen)]
    for place, token in enumerate(following):
        ids, values = logprobs.top_ids[place].tolist(), logprobs.top[place].tolist()
        top = tuple(zip(ids, values, strict=True))[: job.score_prompt]
        job.prompt_logprobs.append(TokenLogprob(token, float(logprobs.chosen[place]), top))
