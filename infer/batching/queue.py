"""The tickets that wait for a slot: clients take turns, each client's own come in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any


@dataclass(eq=False)
class Ticket:
    """What the scheduler knows of a request.

    Attributes:
        prompt: token ids, at least one.
        limit: most tokens of the answer, at least one.
        client: whose it is.
        deadline: the time, of the caller's clock, at which it has to end.
        adapter: number of the LoRA adapter; keys and values of another one are not reused.
        reuse: whether keys and values that are in the cache already may be reused.
        waits: whether a token can only be drawn after the one before was read.
        payload: the caller's.
        slot: row of the cache; None while it waits and after its end.
        reused: how many tokens of the prompt were in the cache already.
        filled: how many tokens of the prompt are in the cache, or will be by what was dispatched.
        planned: how many tokens were drawn, or will be by what was dispatched.
        drawn: the tokens that were read from the device.
    """

    prompt: tuple[int, ...]
    limit: int
    client: str = ""
    deadline: float | None = None
    adapter: int = 0
    reuse: bool = True
    waits: bool = False
    payload: Any = None
    slot: int | None = field(default=None, init=False)
    reused: int = field(default=0, init=False)
    filled: int = field(default=0, init=False)
    planned: int = field(default=0, init=False)
    drawn: list[int] = field(default_factory=list, init=False)

    @property
    def unread(self) -> int:
        """How many tokens of the prompt have still to be dispatched."""
        return len(self.prompt) - self.filled

    @property
    def going(self) -> bool:
        """Whether its prompt was read and it may have more tokens."""
        return not self.unread and self.planned < self.limit

    @property
    def ready(self) -> bool:
        """Whether its next token can be drawn now."""
        return self.going and (not self.waits or self.planned <= len(self.drawn))


class Queue:
    """Waiting tickets; iterating yields them all, client by client."""

    def __init__(self):
        self._clients: dict[str, deque[Ticket]] = {}  # whose turn is next comes first; none empty

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Ticket]:
        return chain.from_iterable(self._clients.values())

    def put(self, ticket: Ticket) -> None:
        self._clients.setdefault(ticket.client, deque()).append(ticket)

    def take(self) -> Ticket:
        """Remove and return the next ticket; its client's next turn comes after all others'."""
        client, tickets = next(iter(self._clients.items()))
        ticket = tickets.popleft()
        del self._clients[client]
        if tickets:
            self._clients[client] = tickets
        return ticket

    def discard(self, ticket: Ticket) -> None:
        """Remove a ticket, if it is here."""
        tickets = self._clients.get(ticket.client)
        if tickets and ticket in tickets:
            tickets.remove(ticket)
            if not tickets:
                del self._clients[ticket.client]
