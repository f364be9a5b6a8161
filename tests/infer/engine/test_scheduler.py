"""The schedule of a call, with a stand-in for the device that writes down what it is asked for."""

from types import SimpleNamespace

import numpy as np
import pytest

from infer.engine.params import SamplingParams
from infer.engine.programs import Made
from infer.engine.scheduler import Scheduler
from infer.engine.steps import IDLE, Output, State
from tests.infer.engine.test_rows import batch_of


class Device:
    """Answers row r with r * 100, r * 100 + 1, ...; its cache is the number of its slots."""

    config = params = device = None  # only asked for when memory runs out

    def __init__(self):
        self.log = []
        self.places = SimpleNamespace(put=lambda controls: controls)
        self.drawn = 0

    def counting(self):
        self.made = Made()
        return self

    def compile_ahead(self, key, begin):
        self.log.append("compile")
        self.made.seconds, self.made.programs = 1000.0, 2  # in none of the other times

    def room(self, cache):
        return cache.size

    def new_cache(self, batch, size):
        self.log.append(("new", batch, size))
        return SimpleNamespace(size=size)

    def grow(self, cache, needed, largest):
        assert needed <= largest
        if needed > cache.size:
            self.log.append(("grow", needed))
            cache = SimpleNamespace(size=largest)
        return cache

    def prefill(self, part, size, counts, controls):
        self.log.append(("prefill", *part.tokens.shape))
        return self.step(SimpleNamespace(size=size), part.lengths > 0)

    def read(self, part, cache):
        self.log.append(("read", *part.tokens.shape))
        return cache

    def extend(self, part, counts, controls, cache):
        self.log.append(("extend", *part.tokens.shape))
        return self.step(cache, part.lengths > 0)

    def decode(self, controls, keep, state, **kwargs):
        self.log.append(("decode", keep.tolist()))
        return self.step(state.cache, keep)

    def step(self, cache, keep):
        tokens = np.where(keep, np.arange(len(keep)) * 100 + self.drawn, IDLE)
        self.drawn += 1
        return State(cache, *(None,) * 4), Output(tokens, None)


def scheduler(prompts, sampling, **kwargs):
    return Scheduler(Device(), batch_of(prompts, sampling, **kwargs))


def limited(*limits):
    return [SamplingParams(max_new_tokens=limit) for limit in limits]


def run(one):
    """The events of a scheduler and what its device was asked for."""
    events = list(one.events())
    return events, one._executor.log


def test_each_row_gets_its_tokens_and_leaves_when_it_has_enough():
    one = scheduler([[5, 6], [7]], limited(2, 4))
    events, log = run(one)
    assert [(event.row, event.token) for event in events] == [
        (0, 0), (1, 100), (0, 1), (1, 101), (1, 102), (1, 103),
    ]  # fmt: skip
    assert log == [
        "compile", ("prefill", 2, 64),
        ("decode", [True, True]), ("decode", [True, True]), ("decode", [False, True]),
    ]  # fmt: skip
    short, long = (row.stats for row in one.batch.rows)  # which leave out compiling
    assert (short.prefill_tokens, short.decode_tokens) == (2, 1)
    assert (long.prefill_tokens, long.decode_tokens) == (1, 3)
    assert long.compile_s == 1000 and long.programs == 2
    assert 0 < short.decode_s < long.decode_s < 60 and abs(long.first_token_s + 1000) < 60


@pytest.mark.parametrize("read", [0, 1, 3])
def test_a_step_is_dispatched_before_the_one_before_is_read_and_none_after_leaving(read):
    one = scheduler([[5]], limited(30))
    events = one.events()
    assert [next(events).token for _ in range(read)] == list(range(read))
    assert one._executor.drawn == (read and read + 1)
    events.close()
    assert one._executor.drawn == (read and read + 1)


def test_long_prompts_are_read_in_parts_into_a_cache_that_grows(monkeypatch):
    monkeypatch.setattr("infer.engine.call.ROOM", 4)
    _, log = run(scheduler([list(range(3, 63))], limited(30), chunk=32))
    assert log[1:4] == [("new", 1, 64), ("read", 1, 32), ("extend", 1, 32)]
    assert [entry for entry in log if entry[0] == "grow"] == [("grow", 65)]


def test_a_session_reads_what_is_new_into_its_cache():
    one = scheduler([[5, 6, 7]], limited(2), reused=2)
    cache = SimpleNamespace(size=128)
    for state, _ in one.steps(cache):
        assert state.cache is cache
    assert one._executor.log[:2] == ["compile", ("extend", 1, 64)]
    stats = one.batch.rows[0].stats
    assert (stats.prefill_tokens, stats.reused_tokens) == (1, 2)
    first = scheduler([[5]], limited(2), reused=0)  # nothing is kept yet
    assert run(first)[1][1:3] == [("new", 1, 64), ("extend", 1, 64)]
