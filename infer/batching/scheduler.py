"""Plans the steps of continuous batching: which rows read a part of their prompt, which decode.

Knows no device and no thread: the caller runs each plan, reports the tokens, and ends the tickets.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, count
from operator import ne
from typing import NamedTuple

from glm2_jax.errors import InputError
from infer.batching.queue import Queue, Ticket


class QueueFull(Exception):
    """As many tickets wait as may."""


class Part(NamedTuple):
    """A part of a prompt, `ids`, that goes to a slot from position `start` on.

    The `last` one of a prompt draws the first token of the answer.
    """

    slot: int
    ticket: Ticket
    start: int
    ids: tuple[int, ...]
    last: bool


class Prefill(NamedTuple):
    """Read parts of prompts: as many as `rows_of` says, each padded to `width`.

    `view` is how many positions of the cache hold all that the step reads and writes, padding
    not counted.
    """

    parts: tuple[Part, ...]
    width: int
    view: int


class Decode(NamedTuple):
    """Draw one more token for the ticket of each slot; None = the slot takes no part."""

    tickets: tuple[Ticket | None, ...]
    view: int


class _Free(NamedTuple):
    """A free slot, and the ids and adapter that its keys and values are of."""

    slot: int
    adapter: int = 0
    ids: tuple[int, ...] = ()


class Scheduler:
    """Gives tickets the slots of one batch, and plans each step.

    The caller may be several steps ahead of the device: the plans count what was dispatched, not
    what was read. A slot whose ticket ended is given to the next one at once, so the device has
    to run the plans in order, and tokens of a ticket without a slot must be dropped.

    Args:
        slots: rows of the cache.
        size: positions of each row; a ticket reserves its prompt and its limit.
        budget: most tokens of a Prefill, padding included.
        widths, views: what programs exist for; those below the largest, which is the budget or the
            size, are used.
        whole: whether each prompt is read in one piece, in a width of up to the size, and nothing
            is reused.
        queue: most tickets that may wait.
        deterministic: whether the numbers of a ticket must not depend on others: each Prefill is
            one row in the width that suits it, all steps have the largest view, and only full
            parts that were read in the same way are reused.
        eager: whether all slots are filled before any row decodes: that is fastest if no user
            waits for the next token.
    """

    def __init__(
        self,
        *,
        slots: int,
        size: int,
        budget: int = 256,
        widths: Sequence[int] = (64, 128),
        views: Sequence[int] = tuple(512 << n for n in range(8)),
        queue: int = 1024,
        deterministic: bool = False,
        eager: bool = False,
        whole: bool = False,
    ):
        views, widest = () if deterministic else views, size if whole else budget
        self.slots, self.size, self.budget = slots, size, budget
        self.widths = (*sorted(width for width in widths if width < widest), widest)
        self.views = (*sorted(view for view in views if view < size), size)
        self.prefix_queries = self.prefix_hits = 0  # tokens of prompts, and how many were reused
        self._most_waiting = queue
        self._deterministic, self._eager, self._whole = deterministic, eager, whole
        self._queue = Queue()
        self._running: dict[int, Ticket] = {}  # by slot, the longest there first
        self._free = [_Free(slot) for slot in range(slots)]  # the least recently used first
        self._prefilled = False  # in the last step

    @property
    def running(self) -> int:
        """How many tickets have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many tickets have none yet."""
        return len(self._queue)

    def rows_of(self, width: int) -> int:
        """Return the most rows of a Prefill: short prompts are read together, others alone."""
        together = width == self.widths[0] and not self._deterministic
        return max(self.budget // width, 1) if together else 1

    def submit(self, ticket: Ticket) -> None:
        """Let a new ticket wait.

        QueueFull: too many wait. InputError: it would never fit.
        """
        asked = len(ticket.prompt) + ticket.limit
        if not ticket.prompt or ticket.limit < 1 or asked > self.size:
            raise InputError(
                f"a prompt of {len(ticket.prompt)} tokens and {ticket.limit} new ones"
                f" do not fit a context of {self.size}",
                "Both must be at least 1; nothing is cut off silently.",
                "Shorten the prompt, or ask for fewer new tokens.",
            )
        if self.waiting >= self._most_waiting:
            raise QueueFull
        self._queue.put(ticket)

    def next(self) -> Prefill | Decode | None:
        """Return the next step to dispatch; None: nothing can be done before a token is read.

        Where there is work for both, Prefill and Decode take turns, unless the schedule is eager.
        """
        if self._prefilled and not self._eager:
            step = self._decode() or self._prefill()
        else:
            step = self._prefill() or self._decode(together=True)
        self._prefilled = isinstance(step, Prefill)
        return step

    def drew(self, ticket: Ticket, token: int) -> None:
        """Note a token that was read from the device; the ticket must have a slot.

        There may be more than were planned, where a step draws several.
        """
        ticket.drawn.append(token)
        ticket.planned = max(ticket.planned, len(ticket.drawn))

    def end(self, ticket: Ticket, *, forget: bool = False) -> None:
        """End a ticket that waits or has a slot; nothing happens if it has ended before.

        The keys and values in its slot may be reused, unless they are to `forget`.
        """
        if ticket.slot is None:
            self._queue.discard(ticket)
            return
        ids = () if forget else self._readable(ticket)
        free = _Free(ticket.slot, ticket.adapter, ids)
        self._free.insert(len(self._free) if ids else 0, free)
        del self._running[ticket.slot]
        ticket.slot = None

    def expired(self, now: float) -> list[Ticket]:
        """End the tickets whose deadline has passed, and return them."""
        there = (*self._queue, *self._running.values())
        late = [one for one in there if one.deadline is not None and one.deadline <= now]
        for ticket in late:
            self.end(ticket)
        return late

    def _prefill(self) -> Prefill | None:
        """Plan parts of the prompts that have waited longest, in the width that ends most.

        Of those the one that reads most, then the one with least padding, then with fewest rows.
        Where prompts are read whole, those that fit the width, and the first one must.
        """
        reading = [ticket for ticket in self._running.values() if ticket.unread]
        # No more than a step can take: who waits still has its turn, and may find a better slot.
        while self._queue and self._free and len(reading) < self.rows_of(self.widths[0]):
            reading.append(self._place(self._queue.take()))
        if not reading:
            return None

        def taken(width: int) -> list[Ticket]:
            fitting = [one for one in reading if one.unread <= width] if self._whole else reading
            return fitting[: self.rows_of(width)]

        def worth(width: int) -> tuple[int, ...]:
            unread = [ticket.unread for ticket in taken(width)]
            ended, read = sum(n <= width for n in unread), sum(min(n, width) for n in unread)
            return ended, read, -len(unread) * width, width

        least = reading[0].unread if self._whole else 0
        width = max((one for one in self.widths if one >= least), key=worth)
        parts = tuple(self._part(one, width) for one in taken(width))
        return Prefill(parts, width, self._view(max(part.ticket.filled for part in parts)))

    def _part(self, ticket: Ticket, width: int) -> Part:
        start, slot = ticket.filled, ticket.slot
        assert slot is not None
        ids = ticket.prompt[start : start + width]
        ticket.filled += len(ids)
        last = not ticket.unread
        ticket.planned += last
        return Part(slot, ticket, start, ids, last)

    def _decode(self, *, together: bool = False) -> Decode | None:
        """Plan one token for every row that is ready.

        With `together`, rows that wait for their tokens do so until all of them are ready, if there
        are no others: they would go on in turns, in twice as many steps.
        """
        going = {slot: ticket for slot, ticket in self._running.items() if ticket.going}
        rows = {slot: ticket for slot, ticket in going.items() if ticket.ready}
        some_wait = len(rows) < len(going) and all(ticket.waits for ticket in rows.values())
        if not rows or (together and some_wait):
            return None
        view = self._view(max(len(one.prompt) + one.planned for one in rows.values()))
        for ticket in rows.values():
            ticket.planned += 1
        return Decode(tuple(map(rows.get, range(self.slots))), view)

    def _view(self, positions: int) -> int:
        return next(view for view in self.views if view >= positions)

    def _place(self, ticket: Ticket) -> Ticket:
        """Give a ticket the free slot with the most of its prompt.

        A slot that would lose more than half of what it holds comes after all others: it is
        likely of another conversation, and shares the beginning that all have.
        """
        shared, free = max(
            ((self._shared(free, ticket), free) for free in self._free),
            key=lambda found: (2 * found[0] >= len(found[1].ids), found[0]),
        )
        self._free.remove(free)
        self._running[free.slot] = ticket
        ticket.slot, ticket.reused, ticket.filled = free.slot, shared, shared
        if ticket.reuse:
            self.prefix_queries += len(ticket.prompt)
            self.prefix_hits += shared
        return ticket

    def _shared(self, free: _Free, ticket: Ticket) -> int:
        """Return how many tokens a ticket can reuse; the last of the prompt has to be read."""
        if self._whole or not ticket.reuse or free.adapter != ticket.adapter:
            return 0
        most = min(len(free.ids), len(ticket.prompt) - 1)
        differing = compress(count(), map(ne, free.ids, ticket.prompt))
        return self._in_full_parts(min(next(differing, most), most))

    def _readable(self, ticket: Ticket) -> tuple[int, ...]:
        """Return the ids whose keys and values the next ticket of the slot can reuse.

        Those of the token that was drawn last may be missing.
        """
        if not self._deterministic:
            return (*ticket.prompt[: ticket.filled], *ticket.drawn[:-1])
        # Other programs draw tokens, decode, and score prompts: their numbers may differ.
        most = min(ticket.filled, len(ticket.prompt) - 1) if ticket.reuse else 0
        return ticket.prompt[: self._in_full_parts(most)]

    def _in_full_parts(self, tokens: int) -> int:
        return tokens // self.budget * self.budget if self._deterministic else tokens
