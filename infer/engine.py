"""The engine: prompts in, answers out, with every compiled program kept by shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from glm2_jax import KVCache, prompt
from glm2_jax.errors import UsageError
from glm2_jax.limits import DRAFT, PREFILL_CHUNK
from glm2_jax.xla import cache_dtype
from infer import speculate, steps
from infer.answer import Completion
from infer.job import Clock, Job, Stats, TokenEvent, listed, whole
from infer.memory.shortage import when_answering
from infer.params import SamplingParams
from infer.programs import OnEvent, Programs, device_errors
from infer.reading import grown

if TYPE_CHECKING:
    from convert import Checkpoint

DEFAULT_MAX_LENGTH = 8192
STEPS_PER_DISPATCH = 32  # of the device loop; the host looks for stop strings in between

Turns = Sequence[tuple[str, str]]


class Engine:
    """Answers with one checkpoint. Make it with `infer.load`.

    Attributes:
      checkpoint, config, tokenizer, template: what was opened.
      max_length: longest prompt and answer together.
      prefill_chunk: how many tokens of prompts, of all rows together, are read at once.
      speculate: tokens that each step drafts and verifies, see `infer.speculate`; 0 = off.
      stats: seconds and tokens of the last call.
      programs: the compiled programs.
      device: where the parameters are.
      cache_dtype: type of the keys and values that are kept.
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
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        self.template = checkpoint.template
        longest = DEFAULT_MAX_LENGTH if max_length is None else whole("max_length", max_length, 2)
        self.max_length = min(longest, self.config.seq_length)
        chunk = PREFILL_CHUNK if prefill_chunk is None else prefill_chunk
        self.prefill_chunk = whole("prefill_chunk", chunk, 1)
        self.speculate = whole("speculate", speculate, 0, DRAFT)
        self.stats = Stats(load_s=load_s)
        self.device = next(iter(jax.tree.leaves(checkpoint.params)[0].devices()))
        dtype = checkpoint.params["final_norm"].dtype
        self.cache_dtype = cache_dtype(self.device.platform, dtype)
        self.programs = Programs(self.device.platform, on_event)
        self._stop_ids = prompt.stop_ids(self.tokenizer)

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
          clean: pass the texts through `clean_response`.

        Raises (on the call):
          InputError: an empty prompt, bad ids, or no room for an answer.
        Raises (while iterating):
          CheckpointError: NaN or Inf in the logits. DeviceError: out of memory.
        """
        return self._run(self._job(prompts, sampling, row_ids, clean))

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
        clock = self._clock()
        with self._device_errors(job):
            self._compile(job, partial(self._first, job), STEPS_PER_DISPATCH)
            state, output = self._prefill(job, clock)
            for _ in job.take(jax.device_get(output)):
                pass
            clock.read(job)
            while job.steps_wanted > job.steps_read:
                state, outputs = self._step(job, state, job.steps_read, STEPS_PER_DISPATCH)
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
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answers a question in a conversation.

        Returns:
          The response, and the history with this round added.
        """
        ids = self.build_prompt(query, history, system)
        params = SamplingParams.from_kwargs(**sampling)
        response = self.complete([ids], params, clean=True)[0].text
        return response, [*((q, a) for q, a in history or ()), (query, response)]

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

    def _run(self, job: Job) -> Iterator[TokenEvent]:
        clock = self._clock()
        with self._device_errors(job):
            self._compile(job, partial(self._first, job))
            for _, events in self._loop(job, clock, *self._prefill(job, clock)):
                yield from events

    def _loop(
        self, job: Job, clock: Clock, state: steps.State, first: steps.Output
    ) -> Iterator[tuple[steps.State, list[TokenEvent]]]:
        """Goes on from the first step, yielding each step's events and the newest state.

        The state may be a step ahead of the events, and is used up when the iterator goes on.
        """
        if self.speculate:

            def step(state: steps.State, drafts: np.ndarray) -> tuple[steps.State, steps.Output]:
                return self._step(job, state, job.drawn, drafts=drafts)

            yield from speculate.loop(job, clock, self.speculate, state, first, step)
            return
        dispatched, pending = 1, first
        while pending is not None:
            following = None
            if dispatched < job.steps_wanted:
                state, following = self._step(job, state, dispatched)
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
            chunk=self.prefill_chunk,
            reused=reused,
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
        )
        prompts = prompts or f"{rows} rows, prompts of up to {longest} tokens"
        return device_errors(f"{prompts}, a cache of {cache} slots", explain)

    def _clock(self) -> Clock:
        self.stats = Stats(load_s=self.stats.load_s)
        return Clock(self.stats, self.programs)

    def _compile(
        self,
        job: Job,
        first: Callable[[], tuple[steps.State, steps.Output]],
        count: int | None = None,
        kept: int = 0,
    ) -> None:
        """Compiles, ahead of all work, the programs that a job begins with.

        Args:
          first: reads the prompts and draws the first tokens.
          count: as in `_step`.
          kept: slots of the cache that `first` begins with; 0 = it is a part of the first program.
        """

        def begin() -> None:
            state, _ = first()
            if job.steps_wanted > 1:
                drafts = np.zeros((job.batch, self.speculate), np.int32)
                self._step(job, state, 1, count, drafts if self.speculate else None)

        widths = tuple(part.tokens.shape for part in job.parts)
        key = (widths, kept, job.cache_size, job.largest_cache, job.steps_wanted > 1, count)
        key = (*key, self.speculate)
        self.programs.ahead(key, begin)

    def _prefill(self, job: Job, clock: Clock) -> tuple[steps.State, steps.Output]:
        clock.prefill_starts()
        return self._first(job)

    def _first(self, job: Job) -> tuple[steps.State, steps.Output]:
        if len(job.parts) > 1:
            return self._read(job, self._empty_cache(job))
        (part,) = job.parts
        return self._call(
            job,
            "prefill",
            (*part.tokens.shape, job.cache_size),
            partial(steps.prefill, self.config, job.cache_size, dtype=self.cache_dtype),
            self.checkpoint.params,
            part.tokens,
            part.lengths,
            job.controls,
        )

    def _empty_cache(self, job: Job) -> KVCache:
        make = partial(KVCache.zeros, self.config, job.batch, job.cache_size, self.cache_dtype)
        if self.programs.tracing:
            return jax.eval_shape(make)
        with jax.default_device(self.device):
            return make()

    def _read(self, job: Job, cache: KVCache) -> tuple[steps.State, steps.Output]:
        """Reads the parts of the prompts and draws the first tokens; `cache` is used up."""
        *full, last = job.parts
        for part in full:
            cache = self.programs.call(
                "read",
                (*part.tokens.shape, cache.size),
                partial(steps.read, self.config),
                self.checkpoint.params,
                *part,
                cache,
                donate=4,
            )
        return self._call(
            job,
            "extend",
            (*last.tokens.shape, cache.size),
            partial(steps.extend, self.config),
            self.checkpoint.params,
            *last,
            job.seen,
            job.controls,
            cache,
            donate=6,
        )

    def _grow(self, cache: KVCache, needed: int, largest: int) -> KVCache:
        """The cache, with more slots if it has fewer than `needed`."""
        if needed <= cache.size:
            return cache
        size = grown(cache.size, needed, largest)
        key = (cache.length.size, cache.size, size)
        return self.programs.call("grow", key, partial(steps.grow, size), cache)

    def _step(
        self,
        job: Job,
        state: steps.State,
        drawn: int,
        count: int | None = None,
        drafts: np.ndarray | None = None,
    ) -> tuple[steps.State, steps.Output]:
        """One step, or `count` of them on the device, in a cache that has room for them.

        Args:
          state: is used up.
          drawn: tokens that each row has drawn before.
          drafts: int32 [B, N], the tokens that may come, which the step then verifies.
        """
        name, width, more = "decode", count or 1, []
        function = partial(steps.decode, self.config)
        if count is not None:
            name, function = "decode_many", partial(steps.decode_many, self.config, count)
        if drafts is not None:
            name, function = "verify", partial(speculate.verify, self.config)
            width, more = drafts.shape[1] + 1, [drafts]
        cache = cast(KVCache, state.cache)
        cache = self._grow(cache, job.slots(drawn + width), job.largest_cache)
        return self._call(
            job,
            name,
            (job.batch, cache.size, *(array.shape[1] for array in more)),
            function,
            self.checkpoint.params,
            job.controls,
            job.keep,
            state._replace(cache=cache),
            *more,
            donate=3,
        )

    def _call(
        self, job: Job, *args: Any, donate: int | None = None
    ) -> tuple[steps.State, steps.Output]:
        state, output = self.programs.call(*args, donate=donate)
        if self.programs.tracing:
            return state, output
        if job.sampling.logprobs is None:  # then the host copies nothing but the tokens
            output = output._replace(logprobs=None)
        jax.tree.map(lambda array: array.copy_to_host_async(), output)
        return state, output

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
