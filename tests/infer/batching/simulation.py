"""A device and a caller for the scheduler, without any model.

The device's keys stand for all that was read before them, and a token for all keys that it saw: a
row of another ticket, a stale key, a gap or a step too many give another answer.
"""

from collections import Counter, deque
from itertools import count

import pytest

from glm2_jax.errors import InputError
from infer.batching.queue import Ticket
from infer.batching.scheduler import Decode, Prefill, QueueFull, Scheduler

END = 0  # the end token; prompts have others


def key(row: list, token: int, adapter: int, how: object) -> int:
    """The key of the token after those in `row`."""
    return hash((row[-1] if row else 0, token, adapter, how))


def draw(row: list) -> int:
    seen = hash(tuple(row))
    return END if seen % 6 == 0 else 1 + seen % 2**20


def fitting(scheduler: Scheduler, tokens: int) -> int:
    """The width in which so many tokens are read in one row."""
    widths = (width for width in scheduler.widths if width >= tokens)
    return min(widths, default=scheduler.budget)


def alone(ticket: Ticket, scheduler: Scheduler, deterministic: bool) -> list[int]:
    """The answer of a ticket that shares the device with no other."""
    row, answer, budget, view = [], [], scheduler.budget, scheduler.size
    for position, token in enumerate(ticket.prompt):
        start = position // budget * budget
        last = start + budget >= len(ticket.prompt)
        width = fitting(scheduler, len(ticket.prompt) - start)
        how = (width, 1, view, start, last, ticket.reuse) if deterministic else None
        row.append(key(row, token, ticket.adapter, how))
    while True:
        answer.append(draw(row))
        if answer[-1] == END or len(answer) == ticket.limit:
            return answer
        row.append(key(row, answer[-1], ticket.adapter, view if deterministic else None))


class Device:
    """The cache, and the state of each row: its next token, its length, its adapter."""

    def __init__(self, slots: int, size: int, deterministic: bool):
        self.garbage = count(-1, -1)
        self.rows = [[next(self.garbage) for _ in range(size)] for _ in range(slots)]
        self.state = [(next(self.garbage), 0, 0) for _ in range(slots)]
        self.deterministic = deterministic

    def spoil(self, slot: int, start: int = 0, stop: int | None = None) -> None:
        for position in range(len(self.rows[slot]))[start:stop]:
            self.rows[slot][position] = next(self.garbage)

    def run(self, step: Prefill | Decode | None) -> list[tuple[Ticket, int]]:
        """Return the tokens that were drawn."""
        if isinstance(step, Prefill):
            drawn = [(part.ticket, self._read(part, step)) for part in step.parts]
            return [(ticket, token) for ticket, token in drawn if token is not None]
        if step is None:
            return []
        tickets = enumerate(step.tickets)
        return [(ticket, self._step(slot, step.view)) for slot, ticket in tickets if ticket]

    def _read(self, part, step) -> int | None:
        adapter, length = part.ticket.adapter, part.start + len(part.ids)
        how = (step.width, len(step.parts), step.view, part.start, part.last, part.ticket.reuse)
        for position, token in enumerate(part.ids, part.start):
            self._write(part.slot, position, token, adapter, step.view, how)
        self.spoil(part.slot, length, part.start + step.width)  # the padding
        if not part.last:
            return None
        token = draw(self.rows[part.slot][:length][: step.view])
        self.state[part.slot] = token, length, adapter
        return token

    def _step(self, slot: int, view: int) -> int:
        token, length, adapter = self.state[slot]
        if token == END:  # a row that has ended writes nothing that can be relied on
            self.spoil(slot, length, length + 1)
            return next(self.garbage)
        self._write(slot, length, token, adapter, view, view)
        drawn = draw(self.rows[slot][: length + 1][:view])
        self.state[slot] = drawn, length + 1, adapter
        return drawn

    def _write(self, slot, position, token, adapter, view, how) -> None:
        row = self.rows[slot]
        if position < view:
            row[position] = key(row[:position], token, adapter, how if self.deterministic else None)


class World:
    """The caller: dispatches up to `ahead` steps before it reads one, and checks each plan."""

    def __init__(self, *, ahead: int = 1, deterministic: bool = False, queue: int = 99, **sizes):
        self.scheduler = Scheduler(deterministic=deterministic, queue=queue, **sizes)
        self.device = Device(sizes["slots"], sizes["size"], deterministic)
        self.deterministic, self.queue, self.ahead = deterministic, queue, ahead
        self.now, self.last, self.outputs = 0, None, deque()
        self.live: list[Ticket] = []  # in the order of their arrival
        self.tickets: list[Ticket] = []
        self.answers: dict[Ticket, list[int]] = {}
        self.began: dict[Ticket, int] = {}
        self.ended: dict[Ticket, tuple[str, int]] = {}  # why and when
        self.placed: dict[Ticket, int] = {}  # when
        self.read: Counter[Ticket] = Counter()  # tokens of the prompt in the cache
        self.drawn: Counter[Ticket] = Counter()  # tokens dispatched
        self.overtaken: Counter[tuple[Ticket, str]] = Counter()

    def submit(self, prompt, limit: int = 4, **more) -> Ticket:
        ticket = Ticket(tuple(prompt), limit, **more)
        if not (prompt and limit) or len(prompt) + limit > self.scheduler.size:
            with pytest.raises(InputError, match="do not fit"):
                self.scheduler.submit(ticket)
        elif self.scheduler.waiting == self.queue:
            with pytest.raises(QueueFull):
                self.scheduler.submit(ticket)
        else:
            self.scheduler.submit(ticket)
            self.tickets.append(ticket)
            self.live.append(ticket)
            self.answers[ticket], self.began[ticket] = [], self.now
        return ticket

    def end(self, ticket: Ticket, why: str) -> None:
        """End a ticket; "failed" is after its row turned to garbage."""
        if why == "failed" and ticket.slot is not None:
            self.device.spoil(ticket.slot)
        self.scheduler.end(ticket, forget=why == "failed")
        if ticket in self.live:
            self._note_end(ticket, why)

    def _note_end(self, ticket: Ticket, why: str) -> None:
        self.live.remove(ticket)  # ValueError: it has ended before
        self.ended[ticket] = why, self.now
        assert ticket.slot is None

    def tick(self) -> Prefill | Decode | None:
        """Dispatch a step, and read one."""
        for ticket in self.scheduler.expired(self.now):
            self._note_end(ticket, "deadline")
        assert not [one for one in self.live if one.deadline and one.deadline <= self.now]
        step = self._next()
        self.outputs.append(self.device.run(step))
        while len(self.outputs) > (self.ahead if step else 0):
            for ticket, token in self.outputs.popleft():
                if ticket.slot is not None:
                    self._take(ticket, token)
        self.now += 1
        return step

    def finish(self) -> None:
        """Run until all have ended, and check what came of it."""
        while self.live:
            self.tick()
            assert self.now < 10_000, "no progress"
        assert self.scheduler.running == self.scheduler.waiting == 0
        width = self.scheduler.widths[0]
        for ticket in self.tickets:
            why, end = self.ended[ticket]
            wanted, got = alone(ticket, self.scheduler, self.deterministic), self.answers[ticket]
            assert got == (wanted if why == "complete" else wanted[: len(got)])
            together = [
                one
                for one in self.tickets
                if self.began[one] <= end and self.ended[one][1] >= self.began[ticket]
            ]
            each = {one: 1 + one.waits * self.ahead for one in together}  # steps for a token
            work = sum(-(-len(one.prompt) // width) + one.limit * each[one] for one in together)
            assert end - self.began[ticket] <= 2 * work + 2

    def _take(self, ticket: Ticket, token: int) -> None:
        self.scheduler.drew(ticket, token)
        self.answers[ticket].append(token)
        if token == END or len(self.answers[ticket]) == ticket.limit:
            self.end(ticket, "complete")

    def _next(self) -> Prefill | Decode | None:
        scheduler = self.scheduler
        waiting = [one for one in self.live if one not in self.placed]
        unread = {one for one in self.live if one in self.placed and self._unread(one)}
        decoding = {
            one
            for one in self.live
            if one in self.placed and not self._unread(one) and self.drawn[one] < one.limit
        }
        late = {one for one in decoding if one.waits and self.drawn[one] > len(self.answers[one])}
        going = decoding - late
        if self.last is not Prefill and late and all(one.waits for one in going):
            going = set()  # they go together
        can_read = bool(unread or (waiting and scheduler.running < scheduler.slots))
        step = scheduler.next()
        if can_read and going:  # they take turns
            assert step and type(step) is not self.last
        else:
            assert isinstance(step, Prefill if can_read else Decode if going else type(None))
        self.last = type(step)
        self._check_queue(waiting)
        if isinstance(step, Prefill):
            self._check_prefill(step, unread | (set(waiting) & set(self.placed)))
        elif step:
            self._check_decode(step, going)
        return step

    def _unread(self, ticket: Ticket) -> int:
        return len(ticket.prompt) - self.read[ticket]

    def _check_queue(self, waiting: list[Ticket]) -> None:
        """Slots are not shared, a client's tickets go in order, and clients take turns."""
        heads: dict[str, Ticket] = {}
        for ticket in waiting:
            heads.setdefault(ticket.client, ticket)
        left = [one for one in waiting if one.slot is None]
        for ticket in waiting:
            if ticket.slot is None:
                continue
            self.placed[ticket] = self.now
            self.read[ticket] = ticket.reused
            most = len(ticket.prompt) - 1 if ticket.reuse else 0
            assert 0 <= ticket.reused <= most
            assert not [one for one in left[: waiting.index(ticket)] if self._before(one, ticket)]
            for client, head in heads.items():
                if head in left:
                    assert client != ticket.client
                    self.overtaken[head, ticket.client] += 1
                    assert self.overtaken[head, ticket.client] <= 1
        slots = [one.slot for one in self.live if one.slot is not None]
        assert len(set(slots)) == len(slots) == self.scheduler.running <= self.scheduler.slots
        assert self.scheduler.waiting == len(self.live) - len(slots) == len(left) <= self.queue

    def _before(self, one: Ticket, other: Ticket) -> bool:
        at = self.tickets.index
        return one.client == other.client and at(one) < at(other)

    def _check_prefill(self, step: Prefill, unread: set[Ticket]) -> None:
        scheduler = self.scheduler
        assert step.width in scheduler.widths
        assert 1 <= len(step.parts) <= scheduler.rows_of(step.width)
        assert scheduler.rows_of(step.width) * step.width <= scheduler.budget
        if self.deterministic:
            (part,) = step.parts
            assert step.width == fitting(scheduler, len(part.ticket.prompt) - part.start)
        first = step.parts[0].ticket  # who waits longest always has a part
        assert self.placed[first] == min(self.placed[one] for one in unread)
        assert len({part.slot for part in step.parts}) == len(step.parts)
        for part in step.parts:
            ticket, end = part.ticket, part.start + len(part.ids)
            assert ticket in unread and part.slot == ticket.slot
            assert part.start == self.read[ticket]
            assert part.ids == ticket.prompt[part.start : end] != ()
            assert part.last == (end == len(ticket.prompt))
            assert len(part.ids) <= step.width and (part.last or len(part.ids) == step.width)
            self.read[ticket] = end
            self.drawn[ticket] += part.last
        self._check_view(step, max(part.start + len(part.ids) for part in step.parts))

    def _check_decode(self, step: Decode, going: set[Ticket]) -> None:
        assert len(step.tickets) == self.scheduler.slots
        assert {one for one in step.tickets if one} == going
        assert all(one is None or one.slot == slot for slot, one in enumerate(step.tickets))
        self._check_view(step, max(len(one.prompt) + self.drawn[one] for one in going))
        self.drawn.update(going)

    def _check_view(self, step: Prefill | Decode, used: int) -> None:
        views = [self.scheduler.size] if self.deterministic else self.scheduler.views
        assert step.view == min(view for view in views if view >= used)
