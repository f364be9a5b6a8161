"""The scheduler of continuous batching, alone and in a simulation of random traffic."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.batching.queue import Ticket
from infer.batching.scheduler import Decode, Prefill, QueueFull, Scheduler
from tests.infer.batching.simulation import World
from tests.support.paths import ROOT

SIZES = dict(size=40, widths=(2, 4), views=(8, 16, 24))
ARRIVAL = st.fixed_dictionaries(
    {
        "after": st.none()
        | st.integers(0, 5)
        | st.integers(0, 5),  # whose prompt and answer it continues
        "keep": st.integers(0, 35) | st.just(35),  # how much of them
        "more": st.lists(st.integers(1, 2), min_size=1, max_size=12) | st.just([]),
        "limit": st.sampled_from((1, 2, 3, 6, 9, 30)),
        "client": st.sampled_from("aab"),
        "patience": st.none() | st.none() | st.integers(0, 60),
        "adapter": st.sampled_from((0, 0, 0, 1)),
        "reuse": st.sampled_from((True, True, True, False)),
        "waits": st.sampled_from((False, False, True)),
    }
)
TICKS = st.tuples(st.just("tick"), st.integers(1, 12))
ENDS = st.tuples(st.sampled_from(("cancelled", "failed")), st.integers(0, 9))
EVENT = ARRIVAL | ARRIVAL | TICKS | TICKS | ENDS
TRAFFIC = st.integers(1, 80).flatmap(lambda n: st.lists(EVENT, min_size=n, max_size=n))
WORLD = st.fixed_dictionaries(
    {
        "slots": st.integers(1, 4),
        "budget": st.sampled_from((3, 4, 8)),
        "queue": st.sampled_from((2, 99)),
        "ahead": st.integers(0, 2),
        "deterministic": st.booleans(),
    }
)


def play(world: World, events: list) -> None:
    """Let it all happen, then wait for the end."""
    for event in events:
        if isinstance(event, dict):
            event = dict(event)
            after, patience = event.pop("after"), event.pop("patience")
            keep, prompt = event.pop("keep"), []
            if after is not None and world.tickets:
                earlier = world.tickets[-1 - after % len(world.tickets)]
                prompt = [*earlier.prompt, *world.answers[earlier]][:keep]
            deadline = None if patience is None else world.now + patience
            world.submit([*prompt, *event.pop("more")], deadline=deadline, **event)
        elif event[0] == "tick":
            for _ in range(event[1]):
                world.tick()
        elif world.tickets:  # also those that have ended
            world.end(world.tickets[-1 - event[1] % len(world.tickets)], event[0])
    world.finish()


@settings(max_examples=400, derandomize=True, database=None, deadline=None)
@given(WORLD, TRAFFIC)
def test_random_traffic(sizes, events):
    world = World(**SIZES, **sizes)
    play(world, events)
    scheduler = world.scheduler  # no slot was lost: nothing is read, so that no ticket ends
    for client in range(scheduler.slots):
        scheduler.submit(Ticket((1,), 1, str(client)))
        assert scheduler.next()
    assert (scheduler.running, scheduler.waiting) == (scheduler.slots, 0)


def scheduler(slots: int = 4, **more) -> Scheduler:
    return Scheduler(**dict(SIZES, slots=slots, budget=8) | more)


def put(plan: Scheduler, *lengths: int, **more) -> list[Ticket]:
    """Submit prompts of these lengths, of which none begins like another."""
    tickets = [Ticket((100 + index,) * length, 3, **more) for index, length in enumerate(lengths)]
    for ticket in tickets:
        plan.submit(ticket)
    return tickets


def answered(plan: Scheduler, *prompts: str, adapter: int = 0) -> None:
    """Let these prompts be in the slots 0, 1, ... that are free, the first the longest ago."""
    tickets = [Ticket(tuple(map(ord, prompt)), 1, adapter=adapter) for prompt in prompts]
    for ticket in tickets:
        plan.submit(ticket)
    while plan.next():
        pass
    for ticket in tickets:
        plan.end(ticket)


def placed(plan: Scheduler, prompt: str, **more) -> tuple[int | None, int]:
    """The slot of a new ticket, and how many tokens it reuses."""
    ticket = Ticket(tuple(map(ord, prompt)), 1, **more)
    plan.submit(ticket)
    while ticket.slot is None:
        assert plan.next()
    return ticket.slot, ticket.reused


def shape(step: Prefill | Decode | None) -> tuple:
    assert isinstance(step, Prefill)
    return step.width, [(part.start, len(part.ids), part.last) for part in step.parts], step.view


def test_a_long_prompt_is_read_in_parts_between_decode_steps():
    plan = scheduler()
    short, long = put(plan, 1, 21)
    assert shape(plan.next()) == (2, [(0, 1, True), (0, 2, False)], 8)
    assert plan.next() == Decode((short, None, None, None), 8)
    assert shape(plan.next()) == (8, [(2, 8, False)], 16)
    assert plan.next() == Decode((short, None, None, None), 8)
    assert shape(plan.next()) == (8, [(10, 8, False)], 24)
    assert shape(plan.next()) == (4, [(18, 3, True)], 24)  # the short one is at its limit
    assert plan.next() == plan.next()._replace(tickets=(None, long, None, None))
    assert (plan.next(), plan.running, long.planned) == (None, 2, 3)


def test_rows_that_wait_for_their_tokens_go_together_but_hold_up_no_others():
    plan = scheduler()
    (first,) = put(plan, 1, waits=True)
    assert isinstance(plan.next(), Prefill) and plan.next() is None
    plan.drew(first, 1)
    assert plan.next() == Decode((first, None, None, None), 8)
    (second,) = put(plan, 2, waits=True)
    assert isinstance(plan.next(), Prefill) and plan.next() is None
    plan.drew(first, 1)
    assert plan.next() is None  # the second's first token is on its way
    plan.drew(second, 1)
    assert plan.next() == Decode((first, second, None, None), 8)
    (free,) = put(plan, 1)
    assert isinstance(plan.next(), Prefill)
    assert plan.next() == Decode((None, None, free, None), 8)
    plan.drew(second, 1)
    assert plan.next() == Decode((None, second, free, None), 8)
    assert plan.next() is None and first.planned == second.planned == free.planned == 3


@pytest.mark.parametrize(
    ("lengths", "width", "read"),
    [
        ((2, 1, 2, 2, 2), 2, [2, 1, 2, 2]),
        ((30, 2, 2, 2), 2, [2, 2, 2, 2]),  # three can answer
        ((30, 3), 8, [8]),
        ((30, 20), 8, [8]),
        ((5, 2), 8, [5]),
        ((3,), 4, [3]),
    ],
)
def test_the_width_lets_most_prompts_answer_and_then_reads_most(lengths, width, read):
    plan = scheduler()
    put(plan, *lengths)
    step = plan.next()
    assert isinstance(step, Prefill)
    assert (step.width, [len(part.ids) for part in step.parts]) == (width, read)


def test_the_free_slot_with_the_longest_common_prefix_is_reused():
    plan = scheduler(3)
    answered(plan, "abx", "abxyz", "abcde")
    assert plan.prefix_hits == 0
    assert placed(plan, "abxyq") == (1, 4)
    assert placed(plan, "abx") == (0, 2)  # its last token has to be read
    assert placed(plan, "q") == (2, 0)
    assert (plan.prefix_hits, plan.prefix_queries) == (6, 3 + 5 + 5 + 5 + 3 + 1)


def test_among_equals_the_least_recently_used_slot_goes():
    plan = scheduler(3)
    answered(plan, "ab1", "ab2", "ab3")
    answered(plan, "ab1")
    assert [placed(plan, prompt) for prompt in ("ab4", "ab5", "ab6")] == [(1, 2), (2, 2), (0, 2)]


def test_a_long_conversation_does_not_go_for_a_short_beginning():
    plan = scheduler(3)
    answered(plan, "abcdefgh", "xy")
    assert placed(plan, "abc1") == (2, 0)  # nothing is in it
    assert placed(plan, "ab3") == (0, 2)  # now the others have less


def test_keys_of_another_adapter_and_failed_ones_are_not_reused():
    plan = scheduler(2)
    answered(plan, "abcd", adapter=1)
    assert placed(plan, "abcd") == (1, 0)
    assert placed(plan, "abcd", adapter=1, reuse=False) == (0, 0)
    plan = scheduler(2)
    (failed,) = put(plan, 6)
    plan.next()
    plan.end(failed, forget=True)
    plan.end(failed)
    assert placed(plan, "d" * 6) == (0, 0)


def test_the_answer_is_reused_but_for_its_last_token():
    plan = scheduler(1)
    ticket = Ticket((1, 2, 3), 5)
    plan.submit(ticket)
    while plan.next():
        pass
    for token in (4, 5, 6):
        plan.drew(ticket, token)
    plan.end(ticket)
    plan.submit(following := Ticket((1, 2, 3, 4, 5, 6, 7), 5))
    plan.next()
    assert following.reused == 5


def test_deterministic_tickets_reuse_full_parts_alone():
    plan = scheduler(2, deterministic=True)
    assert (plan.widths, plan.views) == ((2, 4, 8), (40,))
    answered(plan, "a" * 16)
    answered(plan, "b" * 17)
    assert placed(plan, "a" * 30) == (0, 8)  # the second part drew a token
    assert placed(plan, "b" * 30) == (1, 16)


def test_clients_take_turns_while_others_wait():
    plan = scheduler(1, queue=5)
    busy = put(plan, 1, 1, 1, client="busy")
    (calm,) = put(plan, 1, client="calm")
    order = []
    while plan.next():
        (ticket,) = (one for one in (*busy, calm) if one.slot is not None)
        order.append(ticket)
        plan.end(ticket)
    assert order == [busy[0], calm, busy[1], busy[2]]


def test_no_more_prompts_have_slots_than_a_step_can_read():
    plan = scheduler(8)
    long = put(plan, *[20] * 6)
    for _ in range(2):
        step = plan.next()
        assert isinstance(step, Prefill)
        assert [part.ticket for part in step.parts] == long[:1]  # the first goes on
        assert (plan.running, plan.waiting) == (4, 2)


def test_the_queue_has_a_limit_and_deadlines_hold_in_it():
    plan = scheduler(1, queue=2)
    first, second = put(plan, 1, 1, deadline=5.0)
    with pytest.raises(QueueFull):
        put(plan, 1)
    plan.next()
    (third,) = put(plan, 1)
    assert (plan.running, plan.waiting) == (1, 2)
    assert plan.expired(4.9) == []
    assert set(plan.expired(5.0)) == {first, second} and plan.expired(9.0) == []
    plan.end(third)
    assert (plan.running, plan.waiting, plan.next()) == (0, 0, None)


def test_planning_needs_no_jax():
    code = "import sys, infer.batching.scheduler; print({'jax', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_an_eager_schedule_fills_all_slots_before_any_row_decodes():
    plan = scheduler(3, eager=True)
    tickets = put(plan, 20, 3, 9, 5)
    while isinstance(step := plan.next(), Prefill):
        pass
    assert isinstance(step, Decode) and step.tickets == tuple(tickets[:3])
