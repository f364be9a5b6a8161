"""The engine with keys and values in int8: every way to the same answer gives the same answer."""

import jax.numpy as jnp
import pytest

from glm2_jax.errors import UsageError
from glm2_jax.quant import QTensor
from infer.batching.batcher import Batcher
from infer.batching.job import Job
from infer.batching.options import BatchOptions
from infer.engine.params import SamplingParams
from infer.engine.session import Session
from tests.support.engine_toy import finished, streamed, toy_engine
from tests.support.mesh_process import run

GREEDY = SamplingParams(temperature=0, max_new_tokens=24)
PROMPTS = [[*range(5, 95)], [7, 8, 9], [9] * 30, [40, 12] * 20]


@pytest.fixture(scope="module")
def engine():
    return toy_engine(max_length=192, kv="int8", prefill_chunk=64)


@pytest.fixture(scope="module")
def alone(engine):
    """The answer to each prompt that is read by itself."""
    return [ids_of(finished(engine.run([ids], GREEDY))) for ids in PROMPTS]


def ids_of(completion) -> list[int]:
    return list(map(int, completion.output_ids))


def test_the_cache_is_int8(engine):
    cache = engine.executor.new_cache(1, 64)
    assert isinstance(cache.k, QTensor) and cache.v.values.dtype == jnp.int8
    assert engine.executor.room(cache) == cache.size == 64
    with pytest.raises(UsageError, match="kv must be one of auto, int8, got 'int4'"):
        toy_engine(kv="int4")


def test_rows_of_a_batch_answer_as_each_alone(engine, alone):
    """In several parts, and in a cache that grows."""
    assert [ids_of(one) for one in streamed(engine, PROMPTS, GREEDY)] == alone
    assert len(set(map(str, alone))) == len(PROMPTS)


def test_drafts_change_no_answer(engine, alone):
    drafting = toy_engine(max_length=192, kv="int8", speculate=3, share=engine)
    found = drafting.complete(PROMPTS, GREEDY)
    assert [ids_of(one) for one in found] == alone
    assert sum(one.stats.accepted_tokens for one in found) > 0


def test_a_conversation_reuses_its_cache(engine):
    session, ids = Session(engine), PROMPTS[0]
    for reused in (False, True):
        answer = finished(session.run(ids, GREEDY))
        assert ids_of(answer) == ids_of(finished(engine.run([ids], GREEDY)))
        assert (answer.stats.reused_tokens > 0) == reused
        ids = [*ids, *ids_of(answer), 8, 9]


def test_slots_answer_as_each_alone_and_reuse_what_they_hold(engine, alone):
    batcher, found = Batcher(engine, BatchOptions(slots=2, size=192)), {}

    def ask(ids: list[int], number: int) -> Job:
        (row,) = engine.rows([ids], GREEDY)
        job = Job(row, lambda event: found.update({number: event.completion}))
        batcher.submit(job)
        return job

    for number, ids in enumerate(PROMPTS):
        ask(ids, number)
    while batcher.step():
        pass
    assert [ids_of(found[number]) for number in range(len(PROMPTS))] == alone
    longer = [*PROMPTS[-1], *alone[-1], 8, 9]
    job = ask(longer, -1)
    while batcher.step():
        pass
    assert job.row.stats.reused_tokens == len(longer) - 3
    assert ids_of(found[-1]) == ids_of(finished(engine.run([longer], GREEDY)))


def test_a_mesh_answers_as_one_device():
    """With four parts of the rows and two of the key/value heads; scales are cut like integers."""
    found = run("tests.support.mesh_kv")
    assert found["differ"] == []
    assert found["parts"] == [[2, 1, 1, 64, 8], [2, 1, 1, 64]]
    # In place, and nothing larger than the logits of a step moves between devices.
    assert found["alias"] >= found["cache"] and found["moved"] <= 4 * 104
