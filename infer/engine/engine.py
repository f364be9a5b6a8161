"""The engine: prompts in, answers out, with every compiled program kept by shape."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from glm2_jax.errors import UsageError
from glm2_jax.limits import DRAFT, PREFILL_CHUNK
from glm2_jax.runtime.devices import device_errors
from glm2_jax.text import prompt
from infer.engine import drafts as speculate
from infer.engine import steps
from infer.engine.answer import Completion
from infer.engine.call import Job, TokenEvent
from infer.engine.executor import Executor
from infer.engine.left import closed_at_exit
from infer.engine.params import SamplingParams
from infer.engine.programs import OnEvent
from infer.engine.rows import listed, whole
from infer.engine.stats import Clock, Stats
from infer.memory.shortage import when_answering

if TYPE_CHECKING:
    from convert import Checkpoint

DEFAULT_MAX_LENGTH = 8192
STEPS_PER_DISPATCH = 32  # of the device loop; the host looks for stop strings in between

Turns = Sequence[tuple[str, prompt.Reply]]


class Engine:
    """Answers with one checkpoint. Make it with `infer.load`.

    Attributes:
      checkpoint, config, tokenizer, template: what was opened.
      max_length: longest prompt and answer together.
      prefill_chunk: how many tokens of prompts, of all rows together, are read at once.
      speculate: tokens that each step drafts and verifies, see `infer.engine.drafts`; 0 = off.
      stats: seconds and tokens of the last call.
      executor: runs the programs on the device.
      programs: the compiled programs.
      device: where the parameters are; on a mesh one of its devices, which stands for all.
      mesh: which devices the parameters are spread over; None = one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_length: int | None = None,
        prefill_chunk: int | None = None,
        speculate: int = 0,
        load_s: float = 0.0,
        on_event: OnEvent | None = None,
    ):
        self._checkpoint = checkpoint
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        self.template = checkpoint.template
        longest = DEFAULT_MAX_LENGTH if max_length is None else whole("max_length", max_length, 2)
        self.max_length = min(longest, self.config.seq_length)
        chunk = PREFILL_CHUNK if prefill_chunk is None else prefill_chunk
        self.prefill_chunk = whole("prefill_chunk", chunk, 1)
        self.speculate = whole("speculate", speculate, 0, DRAFT)
        self.stats = Stats(load_s=load_s)
        self.executor = Executor(self.config, checkpoint.params, on_event)
        self.programs, self.device = self.executor.programs, self.executor.device
        self.mesh = self.executor.places.mesh
        self._stop_ids = prompt.stop_ids(self.tokenizer)

    @property
    def checkpoint(self) -> Checkpoint:
        """What the engine answers with; another one of the same shapes may take its place."""
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self.executor.params = checkpoint, checkpoint.params

    def build_prompt(
        self, query: str, history: Turns | None = None, system: str | None = None
    ) -> list[int]:
        """The ids of a question in the checkpoint's template."""
        turns = () if history is None else history
        return prompt.build_prompt(self.tokenizer, self.template, query, turns, system)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        row_ids: Sequence[int] | None = None,
        clean: bool = False,
    ) -> Iterator[TokenEvent]:
        """Answers prompts together, yielding every token as it comes.

        Each step is dispatched before the one before it is read, so the device does not wait for
        the host. The iterator may be left at any time.

        Args:
          prompts: token ids; every prompt is a row.
          row_ids: a number of 0 or more for each prompt, default its index: which random numbers
            it draws. A prompt gets the same tokens under the same number in any call.
          clean: pass the texts through `clean_response`; with the template chatglm3, read them as
            messages.

        Raises (on the call):
          InputError: an empty prompt, bad ids, or no room for an answer.
        Raises (while iterating):
          CheckpointError: NaN or Inf in the logits. DeviceError: out of memory.
        """
        return closed_at_exit(self._run(self._job(prompts, sampling, row_ids, clean)))

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        row_ids: Sequence[int] | None = None,
        clean: bool = False,
    ) -> list[Completion]:
        """Answers prompts together in a loop on the device; the same answers as `run`.

        Arguments and errors are those of `run`. With `speculate` the loop is that of `run`, too.
        """
        job = self._job(prompts, sampling, row_ids, clean)
        if self.speculate:
            for _ in self._run(job):
                pass
            return [answer.completion() for answer in job.answers]
        clock, device = self._clock(), self.executor
        with self._device_errors(job):
            self._compile(job, partial(device.prefill, job), count=STEPS_PER_DISPATCH)
            clock.prefill_starts()
            state, output = device.prefill(job)
            for _ in job.take(jax.device_get(output)):
                pass
            clock.read(job)
            while job.steps_wanted > job.steps_read:
                state, outputs = device.step(job, state, job.steps_read, STEPS_PER_DISPATCH)
                outputs = jax.device_get(outputs)
                for index in range(STEPS_PER_DISPATCH):
                    output = jax.tree.map(lambda x, index=index: x[index], outputs)
                    for _ in job.take(output):
                        pass
                clock.read(job)
        return [answer.completion() for answer in job.answers]

    def generate(self, prompts: Iterable[str | Sequence[int]], **sampling: Any) -> list[Completion]:
        """Answers prompts together.

        Args:
          prompts: a string is a question, put through the template, its answer cleaned (but not
            with the template "raw"); a list of ids is continued as it is.
          **sampling: see `SamplingParams.from_kwargs`.
        """
        ids, clean = self._prompt_ids(prompts)
        return self.complete(ids, SamplingParams.from_kwargs(**sampling), clean=clean)

    def stream(
        self, prompts: Iterable[str | Sequence[int]], **sampling: Any
    ) -> Iterator[tuple[int, str]]:
        """As `generate`, yielding (row, piece of text) as it comes."""
        ids, clean = self._prompt_ids(prompts)
        events = self.run(ids, SamplingParams.from_kwargs(**sampling), clean=clean)
        return ((event.row, event.text) for event in events if event.text)

    def chat(
        self,
        query: str,
        history: Turns | None = None,
        *,
        system: str | None = None,
        **sampling: Any,
    ) -> tuple[str, list[tuple[str, prompt.Reply]]]:
        """Answers a question in a conversation.

        Returns:
          The response, and the history with this round added: (question, response), or where the
          response is more than one plain message, (question, messages), see `Completion.reply`.
        """
        ids = self.build_prompt(query, history, system)
        params = SamplingParams.from_kwargs(**sampling)
        answer = self.complete([ids], params, clean=True)[0]
        return answer.text, [*((q, a) for q, a in history or ()), (query, answer.reply)]

    def stream_chat(
        self,
        query: str,
        history: Turns | None = None,
        *,
        system: str | None = None,
        cumulative: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """As `chat`, yielding the response piece by piece (`cumulative`: all of it so far)."""
        ids = self.build_prompt(query, history, system)
        events = self.run([ids], SamplingParams.from_kwargs(**sampling), clean=True)
        return _texts(events, cumulative)

    def _run(self, job: Job) -> Generator[TokenEvent, None, None]:
        clock = self._clock()
        with self._device_errors(job):
            self._compile(job, partial(self.executor.prefill, job))
            clock.prefill_starts()
            for _, events in self._loop(job, clock, *self.executor.prefill(job)):
                yield from events

    def _loop(
        self, job: Job, clock: Clock, state: steps.State, first: steps.Output
    ) -> Iterator[tuple[steps.State, list[TokenEvent]]]:
        """Goes on from the first step, yielding each step's events and the newest state.

        The state may be a step ahead of the events, and is used up when the iterator goes on.
        """
        if self.speculate:

            def step(
                state: steps.State, drafts: np.ndarray | None
            ) -> tuple[steps.State, steps.Output]:
                return self.executor.step(job, state, job.drawn, drafts=drafts)

            yield from speculate.loop(job, clock, self.speculate, state, first, step)
            return
        dispatched, pending = 1, first
        while pending is not None:
            following = None
            if dispatched < job.steps_wanted:
                state, following = self.executor.step(job, state, dispatched)
                dispatched += 1
            events = list(job.take(jax.device_get(pending)))
            clock.read(job)
            yield state, events
            pending = following if job.steps_wanted else None

    def _job(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        row_ids: Sequence[int] | None,
        clean: bool,
        reused: int = 0,
    ) -> Job:
        return Job(
            prompts,
            sampling,
            self.tokenizer,
            stop_ids=self._stop_ids,
            vocab_size=self.config.vocab_size,
            max_length=self.max_length,
            row_ids=row_ids,
            clean=clean,
            roles=clean and self.template == "chatglm3",
            chunk=self.prefill_chunk,
            reused=reused,
            rows=self.executor.places.rows,
        )

    def _device_errors(self, job: Job, prompts: str = "") -> AbstractContextManager[None]:
        """Has an error of memory say what a job needs; `prompts` describes them."""
        rows, longest, cache = job.batch, job.slots(0), job.largest_cache
        explain = partial(
            when_answering,
            self.config,
            self.checkpoint.params,
            self.device,
            context=cache,
            batch=rows,
            chunk=self.prefill_chunk,
            columns=1 + self.speculate,
        )
        prompts = prompts or f"{rows} rows, prompts of up to {longest} tokens"
        return device_errors(f"{prompts}, a cache of {cache} slots", explain)

    def _compile(self, job: Job, first: Callable[[], Any], **more: Any) -> None:
        self.executor.compile_ahead(job, first, drafted=self.speculate, **more)

    def _clock(self) -> Clock:
        self.stats = Stats(load_s=self.stats.load_s)
        return Clock(self.stats, self.programs)

    def _prompt_ids(self, prompts: Iterable[str | Sequence[int]]) -> tuple[list[list[int]], bool]:
        """The ids of prompts of one kind, and whether their answers are to be cleaned."""
        prompts = listed(prompts, "prompts must be a list of texts, or of lists of token ids")
        questions = [prompt for prompt in prompts if isinstance(prompt, str)]
        if questions and len(questions) < len(prompts):
            raise UsageError("prompts must be all strings or all lists of token ids")
        clean = bool(questions) and self.template != "raw"
        return [self.build_prompt(p) for p in questions] or prompts, clean


def _texts(events: Iterator[TokenEvent], cumulative: bool) -> Iterator[str]:
    text = ""
    for event in events:
        if event.text:
            text += event.text
            yield text if cumulative else event.text
