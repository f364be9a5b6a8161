"""A conversation: its turns, the prompts that they make, and the answers to new questions."""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

from glm2_jax.cli.arguments import MAX_SEED
from glm2_jax.errors import CheckpointError, InputError
from glm2_jax.text.prompt import build_followup
from glm2_jax.text.roles import Reply
from infer.engine.answer import RoleText, reply_of
from infer.engine.call import closed_at_exit
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.engine.rows import TokenEvent
from infer.engine.session import Session
from infer.engine.stats import Stats, add_stats
from infer.requests.exchange import warn_beyond_aligned
from infer.requests.request import Request

Events = Generator[TokenEvent, None, None]
_WITH_IDS = 8  # newest turns that keep their ids, for `undo`: a turn has those of all before it


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: Reply  # text, or the messages of an answer with roles that is more than a plain one
    # All that the model had read and written after the answer, if it says the same as the text.
    ids: tuple[int, ...] | None = None
    first: int = 0  # index of the oldest turn in its prompt
    limit: int = 0  # tokens that its prompt could have; 0 = unknown: turns before `first` may fit


class Conversation:
    """Questions and answers, oldest first; `reply` asks the next question.

    A turn draws with seed + number of turns before it, so that the same conversation gives the same
    answers; a retry of a turn draws other random numbers.

    Attributes:
        engine, sampling, system: what answers, how, and by which instructions.
        turns: oldest first.
        unanswered: the last question, if its answer was empty.
        left_out: how many of the oldest turns the last prompt did not have room for.
        stats, total: statistics of the last answer, and of all.
    """

    def __init__(
        self, engine: Engine, sampling: SamplingParams, *, say: Callable[[str], None] = print
    ):
        self.engine, self.sampling = engine, sampling
        self.system: str | None = None
        self.turns: list[Turn] = []
        self.unanswered: str | None = None
        self.left_out = 0
        self.stats = Stats()
        self.total: Stats | None = None
        self._session = Session(engine)
        self._say = say
        self._attempt = 0
        self._warned = False

    @property
    def history(self) -> list[tuple[str, Reply]]:
        return [(turn.question, turn.answer) for turn in self.turns]

    @property
    def ids(self) -> tuple[int, ...] | None:
        """All that a model with roles has read and written, if known and of all turns."""
        if not self.engine.written.roles or not self.turns or self.turns[-1].first:
            return None
        return self.turns[-1].ids

    @property
    def ceiling(self) -> int:
        """Tokens that prompt and answer together may have."""
        return min(self.sampling.max_length or self.engine.max_length, self.engine.max_length)

    @property
    def limit(self) -> int:
        """Tokens that a prompt may have, so that some are free for the answer."""
        quarter = max(self.ceiling // 4, 1)
        return self.ceiling - min(self.sampling.max_new_tokens or quarter, quarter)

    def used(self) -> int:
        """Return the tokens of the conversation so far, as the next prompt would begin."""
        if not self.turns:
            return 0
        last = self.turns[-1]
        return len(last.ids) if last.ids else len(self._build("?", last.first))

    def replace(
        self,
        history: Iterable[tuple[str, Reply]],
        system: str | None,
        ids: Sequence[int] | None = None,
    ) -> None:
        """Replace this conversation by another one.

        `ids` is all that a model with roles had read and written, to continue if it says the same.
        InputError: the model's template cannot express it; then nothing has changed.
        """
        history = list(history)
        Request("?", tuple(history), system)
        built = self.engine.build_prompt("?", history, system)
        self.turns = [Turn(question, answer) for question, answer in history]
        if ids and history and self.engine.written.roles:
            if self._say_the_same([*ids, *self._followup("?", len(history) + 1)], built):
                self.turns[-1] = dataclasses.replace(self.turns[-1], ids=tuple(ids))
        self.system = system
        self.unanswered = None
        self.left_out = self._attempt = 0

    def set_system(self, text: str | None) -> None:
        """Change the instructions, from the next question on."""
        Request("?", system=text)
        self.engine.build_prompt("?", self.history, text)
        self.system = text
        self.turns = [dataclasses.replace(turn, ids=None, limit=0) for turn in self.turns]

    def undo(self) -> Turn | None:
        """Remove and return the last turn; None if there is none."""
        self.unanswered, self._attempt = None, 0
        return self.turns.pop() if self.turns else None

    def reply(self, question: str) -> Events:
        """Answer a question. What has come of the answer when the iterator ends or is closed
        becomes part of the conversation, unless it is blank.

        InputError, on the first step: no question, or one that is too long; nothing has changed.
        """
        self._attempt = 0
        return closed_at_exit(self._reply(question))

    def retry(self) -> Events:
        """Answer the last question again; the old answer stays if the new one is empty.

        InputError, on the first step: there is no question.
        """
        return closed_at_exit(self._retry())

    def _retry(self) -> Events:
        old, question = None, self.unanswered
        if question is None:
            if not self.turns:
                raise InputError("there is no question yet that could be asked again")
            old = self.turns.pop()
            question = old.question
        self._attempt += 1
        before = len(self.turns)
        try:
            yield from self._reply(question)
        finally:
            if old is not None and len(self.turns) == before:
                self.turns.append(old)
                self.unanswered = None

    def _reply(self, question: str) -> Events:
        Request(question)
        ids, left_out = self._fit(question)
        self._tell(ids, left_out)
        sampling = dataclasses.replace(
            self.sampling, seed=(self.sampling.seed + len(self.turns)) % (MAX_SEED + 1)
        )
        events = self._session.run(ids, sampling, draw=self._attempt, clean=True)
        text, tokens = "", []
        try:
            for event in events:
                text += event.text
                if event.token is not None:
                    tokens.append(event.token)
                yield event
        finally:
            self._session.close()
            self.stats = events.stats
            self.total = add_stats(self.total, self.stats)
            self._keep(question, text, ids, tokens)

    def _keep(self, question: str, text: str, ids: list[int], tokens: list[int]) -> None:
        self.unanswered = None if text.strip() else question
        if self.unanswered is not None:
            return
        reply: Reply = text
        written = None
        if self.engine.written.roles:
            reader = RoleText(self.engine.tokenizer, ids[-1])
            written = _text_of(reader, tokens)
            reply = reply_of(text, reader.messages(text))
        elif self.engine.written.rounds is not None:
            written = self.engine.tokenizer.decode(tokens)
        exact = (*ids, *tokens) if written == text else None
        self.turns.append(Turn(question, reply, exact, self.left_out, self.limit))
        if len(self.turns) > _WITH_IDS:
            old = -1 - _WITH_IDS
            self.turns[old] = dataclasses.replace(self.turns[old], ids=None)

    def _fit(self, question: str) -> tuple[list[int], int]:
        """Return the prompt's ids, and how many of the oldest turns are left out for the answer."""
        limit, count = self.limit, len(self.turns)
        # What did not fit into the last prompt does not fit into this one, which is longer.
        left_out = self.turns[-1].first if count and limit <= self.turns[-1].limit else 0
        ids = self._build(question, left_out)
        if len(ids) > limit and left_out < count:
            options = range(left_out + 1, count)  # if none fits, all turns are left out
            left_out += 1 + bisect_left(
                options, True, key=lambda n: len(self._build(question, n)) <= limit
            )
            ids = self._build(question, left_out)
        if len(ids) >= self.ceiling:
            raise InputError(
                f"the question is too long: alone it takes {len(ids)} tokens",
                f"prompt and answer together may have {self.ceiling}",
                "shorten it, or start with a larger --max-length, as far as the model goes",
            )
        return ids, left_out

    def _build(self, question: str, left_out: int) -> list[int]:
        """Return the ids of a prompt without the oldest turns.

        It continues the ids that the model wrote, as in the published command line: tokenized
        again, the text of an answer may be other tokens (a ChatGLM2 answer begins with another
        one), and all of it would have to be read.
        """
        turns = self.turns[left_out:]
        if turns and turns[-1].ids is not None and turns[-1].first == left_out:
            try:
                return [*turns[-1].ids, *self._followup(question, len(turns) + 1)]
            except CheckpointError:  # this tokenizer cannot; the text always can
                pass
        history = [(turn.question, turn.answer) for turn in turns]
        return self.engine.build_prompt(question, history, self.system)

    def _followup(self, question: str, round_number: int) -> list[int]:
        """Return the ids that follow an answer."""
        tokenizer = self.engine.tokenizer
        if self.engine.written.roles:
            return self.engine.build_prompt(question)[len(tokenizer.prefix_ids) :]
        return build_followup(tokenizer, question, round_number)

    def _say_the_same(self, *prompts: Sequence[int]) -> bool:
        """Return whether these are prompts with the same messages."""
        tokenizer = self.engine.tokenizer
        if max(map(max, prompts)) >= tokenizer.size:
            return False
        return len({_text_of(RoleText(tokenizer, ids[0]), ids) for ids in prompts}) == 1

    def _tell(self, ids: list[int], left_out: int) -> None:
        if left_out > self.left_out:
            turns = "turn is" if left_out == 1 else f"{left_out} turns are"
            self._say(
                f"the oldest {turns} left out to make room, of {len(self.turns)}: "
                f"{self.ceiling - len(ids)} tokens are left for the answer"
            )
        self.left_out = left_out
        if not self._warned:
            self._warned = warn_beyond_aligned(self.engine, len(ids), self.sampling)


def _text_of(reader: RoleText, ids: Sequence[int]) -> str:
    return "".join([reader.push(token) for token in ids]) + reader.flush()
