"""The engine: prompts in, answers out, with every compiled program kept by shape."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from glm2_jax.choices import KV
from glm2_jax.errors import UsageError
from glm2_jax.limits import DRAFT, PREFILL_CHUNK
from glm2_jax.text import prompt
from glm2_jax.text.roles import Reply
from glm2_jax.text.template import Template, find_template
from infer.engine.answer import Answer, Completion
from infer.engine.call import Batch, Call
from infer.engine.executor import Executor
from infer.engine.params import SamplingParams, whole
from infer.engine.programs import OnEvent, Programs
from infer.engine.rows import Row, listed, make_rows
from infer.engine.scheduler import Scheduler

if TYPE_CHECKING:
    from convert import Checkpoint

DEFAULT_MAX_LENGTH = 8192

Turns = Sequence[tuple[str, Reply]]
Samplings = SamplingParams | Sequence[SamplingParams]


class Engine:
    """Answers with one checkpoint. Make it with `infer.load`.

    Several threads may call one engine at once, also before its programs are compiled: what a call
    changes belongs to that call. An iterator that a call returned belongs to one thread at a time,
    as a `Session` does; `checkpoint` must not be replaced while a call is running; and the several
    processes of a mesh must make the same calls in the same order, so each from one thread.

    Args:
        kv: how caches store keys and values: "auto" = in the dtype of the activations, float32 on a
            CPU; "int8" = with a scale for each token and head.
        programs: compiled programs of another engine with the same `kv` to share, see `Programs`;
            None = new ones.
        on_event: called with a kind ("compile") and a line of text, for progress of new ones.

    Attributes:
        checkpoint: what was opened; `config`, `tokenizer` and `template` are parts of it.
        written: how prompts are written by that template.
        max_length: longest prompt and answer together.
        prefill_chunk: how many tokens of prompts, of all rows together, are read at once. Where
            the context is bidirectional, a prompt is read in one piece, however long it is.
        speculate: tokens that each step drafts and verifies, see `infer.engine.drafts`; 0 = off.
        load_s: seconds of opening the checkpoint.
        executor: runs the programs on the device.
        device: where the parameters are; on a mesh one of its devices, which stands for all.
        mesh: the devices that the parameters are spread over; None = one.
        stop_ids: the tokens that end an answer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_length: int | None = None,
        prefill_chunk: int | None = None,
        speculate: int = 0,
        kv: str = "auto",
        load_s: float = 0.0,
        programs: Programs | None = None,
        on_event: OnEvent | None = None,
    ):
        self._checkpoint = checkpoint
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        self.template = checkpoint.template
        self.written: Template = find_template(self.template)
        longest = DEFAULT_MAX_LENGTH if max_length is None else whole("max_length", max_length, 2)
        self.max_length = min(longest, self.config.context_limit)
        usual = self.config.forms.chunk or PREFILL_CHUNK
        chunk = usual if prefill_chunk is None else prefill_chunk
        self.prefill_chunk = whole("prefill_chunk", chunk, 1)
        self.speculate = whole("speculate", speculate, 0, DRAFT)
        self.load_s = load_s
        if kv not in KV:
            raise UsageError(f"kv must be one of {', '.join(KV)}, got {kv!r}")
        self.executor = Executor(self.config, checkpoint.params, programs, kv=kv, on_event=on_event)
        self.device: Any = self.executor.device
        self.mesh: Mesh | None = self.executor.places.mesh
        self.stop_ids = prompt.stop_ids(self.tokenizer)

    @property
    def checkpoint(self) -> Checkpoint:
        """The model that the engine answers with; can be replaced by one of the same shapes."""
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self.executor.params = checkpoint, checkpoint.params

    @property
    def programs(self) -> Programs:
        """The compiled programs."""
        return self.executor.programs

    def build_prompt(
        self, query: str, history: Turns | None = None, system: str | None = None
    ) -> list[int]:
        """Return the ids of a question, or of a text with blanks, in the checkpoint's template."""
        turns = () if history is None else history
        query = prompt.with_blank(self.tokenizer, self.template, query)
        return prompt.build_prompt(self.tokenizer, self.template, query, turns, system)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Samplings,
        *,
        row_ids: Sequence[int] | None = None,
        clean: bool = False,
    ) -> Call:
        """Answer prompts together, yielding every token as it comes.

        Each step is dispatched before the one before it is read, so the device does not wait for
        the host. The iterator may be left at any time.

        Args:
            prompts: token ids; every prompt is a row.
            sampling: how all rows are answered, or each.
            row_ids: a number of 0 or more for each prompt, default its index: which random numbers
                it draws. A prompt gets the same tokens under the same number in any call.
            clean: clean the texts, as the published chat code does; with a template of roles,
                read them as messages.

        Raises (on the call):
            InputError: an empty prompt, bad ids, or no room for an answer.
        Raises (while iterating):
            CheckpointError: NaN or Inf in the logits. DeviceError: out of memory.
        """
        scheduler = self.schedule(prompts, sampling, row_ids=row_ids, clean=clean)
        return Call(scheduler.events(), scheduler.batch.rows)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Samplings,
        *,
        row_ids: Sequence[int] | None = None,
        clean: bool = False,
    ) -> list[Completion]:
        """Answer prompts together, as `run`, whose arguments and errors it has."""
        return self.schedule(prompts, sampling, row_ids=row_ids, clean=clean).complete()

    def generate(self, prompts: Iterable[str | Sequence[int]], **sampling: Any) -> list[Completion]:
        """Answer prompts together.

        Args:
            prompts: a string is a question, put through the template, its answer cleaned (but not
                with the template "raw"); a list of ids is continued as it is.
            **sampling: see `SamplingParams.from_kwargs`; the preset "official", which is the
                default, is that of the template.
        """
        ids, clean = self._prompt_ids(prompts)
        return self.complete(ids, self._sampling(sampling), clean=clean)

    def stream(
        self, prompts: Iterable[str | Sequence[int]], **sampling: Any
    ) -> Iterator[tuple[int, str]]:
        """Do the same as `generate`, yielding (row, piece of text) as it comes."""
        ids, clean = self._prompt_ids(prompts)
        events = self.run(ids, self._sampling(sampling), clean=clean)
        return ((event.row, event.text) for event in events if event.text)

    def chat(
        self,
        query: str,
        history: Turns | None = None,
        *,
        system: str | None = None,
        **sampling: Any,
    ) -> tuple[str, list[tuple[str, Reply]]]:
        """Answer a question in a conversation.

        Returns:
            The response, and the history with this round added: (question, response), or where the
            response is more than one plain message, (question, messages), see `Completion.reply`.
        """
        ids = self.build_prompt(query, history, system)
        answer = self.complete([ids], self._sampling(sampling), clean=True)[0]
        return answer.text, [*((q, a) for q, a in history or ()), (query, answer.reply)]

    def stream_chat(
        self,
        query: str,
        history: Turns | None = None,
        *,
        system: str | None = None,
        cumulative: bool = False,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """Do the same as `chat`, yielding the answer in pieces (`cumulative`: all of it so far)."""
        ids = self.build_prompt(query, history, system)
        events = self.run([ids], self._sampling(sampling), clean=True)
        pieces = (event.text for event in events if event.text)
        return (text for text in itertools.accumulate(pieces)) if cumulative else pieces

    def schedule(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Samplings,
        *,
        row_ids: Sequence[int] | None = None,
        clean: bool = False,
        reused: int | None = None,
    ) -> Scheduler:
        """Return what answers prompts; arguments and errors are those of `run`, and `Batch`'s."""
        batch = Batch(
            self.rows(prompts, sampling, row_ids=row_ids, clean=clean),
            vocab_size=self.config.vocab_size,
            max_length=self.max_length,
            chunk=self.prefill_chunk,
            whole=self.config.block.bidirectional,
            reused=reused,
            multiple=self.executor.places.rows,
        )
        drafts = self.config.idea.drafts
        draft = drafts or self.speculate
        return Scheduler(self.executor, batch, draft=draft, by_idea=drafts > 0)

    def rows(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Samplings,
        *,
        row_ids: Sequence[int] | None = None,
        clean: bool = False,
    ) -> list[Row]:
        """Return a row for each prompt; arguments and errors are those of `run`."""
        how = {"roles": clean and self.written.roles, "wide": self.written.wide}
        answer = partial(Answer, self.tokenizer, stop_ids=self.stop_ids, clean=clean, **how)
        return make_rows(
            prompts,
            sampling,
            row_ids,
            answer,
            vocab_size=self.config.vocab_size,
            max_length=self.max_length,
            banned=self.config.banned_token_ids,
        )

    def _prompt_ids(self, prompts: Iterable[str | Sequence[int]]) -> tuple[list[list[int]], bool]:
        """Return the ids of prompts of one kind, and whether their answers are cleaned."""
        prompts = listed(prompts, "prompts must be a list of texts, or of lists of token ids")
        questions = [prompt for prompt in prompts if isinstance(prompt, str)]
        if questions and len(questions) < len(prompts):
            raise UsageError("prompts must be all strings or all lists of token ids")
        clean = bool(questions) and self.written.chat
        return [self.build_prompt(p) for p in questions] or prompts, clean

    def _sampling(self, given: dict[str, Any]) -> SamplingParams:
        preset = self.written.preset_of(given.get("preset", "official"))
        return SamplingParams.from_kwargs(**{**given, "preset": preset})
