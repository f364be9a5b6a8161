"""The scheduler of continuous batching, alone and in a simulation of random traffic."""

from hypothesis import given, settings
from hypothesis import strategies as st

from infer.batching.queue import Ticket
from tests.infer.batching.simulation import World

SIZES = dict(size=40, widths=(2, 4), views=(8, 16, 24))
ARRIVAL = st.fixed_dictionaries(
    {
        "after": st.none() | st.integers(0, 9),  # whose prompt and answer it continues
        "keep": st.integers(0, 40),  # how much of them
        "more": st.lists(st.integers(1, 2), max_size=12),
        "limit": st.integers(0, 9) | st.just(30),
        "client": st.sampled_from("aab"),
        "patience": st.none() | st.none() | st.integers(0, 60),
        "adapter": st.sampled_from((0, 0, 0, 1)),
        "reuse": st.sampled_from((True, True, True, False)),
    }
)
TICKS = st.tuples(st.just("tick"), st.integers(1, 12))
ENDS = st.tuples(st.sampled_from(("cancelled", "failed")), st.integers(0, 9))
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
@given(WORLD, st.lists(ARRIVAL | ARRIVAL | TICKS | TICKS | ENDS, min_size=1, max_size=60))
def test_random_traffic(sizes, events):
    world = World(**SIZES, **sizes)
    play(world, events)
    scheduler = world.scheduler  # no slot was lost: nothing is read, so that no ticket ends
    for client in range(scheduler.slots):
        scheduler.submit(Ticket((1,), 1, str(client)))
        assert scheduler.next()
    assert (scheduler.running, scheduler.waiting) == (scheduler.slots, 0)
