"""Continuous batching on a toy engine: every answer is that of the request alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import forward, init_lora
from glm2_jax.lora import join_adapters, with_lora
from infer.batching.batcher import Batcher
from infer.batching.job import Failure, Job
from infer.batching.options import BatchOptions
from infer.engine.params import SamplingParams
from tests.support.engine_toy import TOY, compilations, failing, finished, toy_engine, toy_params

OPTIONS = BatchOptions(slots=4, size=128)  # prefills of 64 tokens in two rows, or of 128
SIMPLE = SamplingParams(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def engine():
    return toy_engine(max_length=128)


class Heard(list):
    """The events of a job; calling it is being its listener."""

    def __call__(self, event):
        self.append(event)

    @property
    def last(self):
        return self[-1]

    @property
    def ids(self):
        return list(self.last.completion.output_ids)


def submit(batcher, engine, ids, sampling=SIMPLE, *, draw=0, **more) -> tuple[Job, Heard]:
    heard = Heard()
    (row,) = engine.rows([ids], sampling, row_ids=[draw])
    job = Job(row, heard, **more)
    batcher.submit(job)
    return job, heard


def run(batcher) -> int:
    steps = 0
    while batcher.step():
        steps += 1
    return steps


def alone(engine, ids, sampling, draw=0):
    return finished(engine.run([ids], sampling, row_ids=[draw]))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 600, int(rng.integers(1, 100))).tolist() for _ in range(count)]


def test_every_answer_is_that_of_the_request_alone(engine):
    """Requests of all kinds arrive at random steps; more than there are slots."""
    rng = np.random.default_rng(1)
    kinds = [
        SIMPLE,
        SamplingParams(temperature=1, top_k=0, top_p=1, max_new_tokens=12),
        SamplingParams(temperature=0.7, top_k=9, top_p=0.9, seed=2**40, max_new_tokens=20),
        SamplingParams(temperature=0, repetition_penalty=1.5, logprobs=3, max_new_tokens=15),
        SamplingParams(temperature=1, presence_penalty=1, frequency_penalty=1, max_new_tokens=9),
    ]
    batcher, asked = Batcher(engine, OPTIONS), []
    for number, ids in enumerate(prompts(30)):
        sampling = kinds[number % len(kinds)]
        heard = submit(batcher, engine, ids, sampling, draw=number)[1]
        asked.append((ids, sampling, number, heard))
        for _ in range(rng.integers(0, 6)):
            batcher.step()
    run(batcher)
    assert batcher.ended == 30 and batcher.open == 0
    for ids, sampling, number, heard in asked:
        want = alone(engine, ids, sampling, number)
        assert heard.last.completion.output_ids == want.output_ids
        assert heard.last.completion.text == want.text == "".join(one.text for one in heard)
        if want.logprobs:
            got = [entry.logprob for entry in heard.last.completion.logprobs]
            np.testing.assert_allclose(got, [one.logprob for one in want.logprobs], atol=1e-4)


def test_no_request_waits_for_the_longest_beside_it(engine):
    batcher, ended = Batcher(engine, BatchOptions(slots=2, size=128, tokens_per_prefill=64)), []
    for draw, limit in enumerate([60, *[3] * 12]):
        (row,) = engine.rows([[5, 6]], SamplingParams(temperature=0, max_new_tokens=limit))
        batcher.submit(Job(row, lambda event, n=draw: event.completion and ended.append(n)))
    assert run(batcher) < 60 + 2 * 13 and ended == [*range(1, 13), 0]


def test_drafts_change_no_answer_and_save_steps(engine):
    asked = [[*range(5, 25)] * 2, [7, 8, 9], [9] * 30]
    sampling = SamplingParams(temperature=0, max_new_tokens=40)
    counts = []
    for draft in (0, 4):
        engine = toy_engine(max_length=128, speculate=draft, share=engine)
        batcher = Batcher(engine, dataclasses.replace(OPTIONS, deterministic=True))
        heard = [submit(batcher, engine, ids, sampling)[1] for ids in asked]
        counts.append(run(batcher))
        assert [one.ids for one in heard] == [
            list(alone(engine, ids, sampling).output_ids) for ids in asked
        ]
    stats = batcher.stats
    assert 0 < stats.accepted_tokens < stats.drafted_tokens and counts[1] < counts[0]


def test_nothing_is_compiled_after_the_warm_up(engine):
    batcher = Batcher(engine, OPTIONS)
    batcher.warm()
    submit(batcher, engine, [5, 6, 7])
    run(batcher)  # transfers and small conversions of the host
    with compilations() as found:
        for ids in prompts(9, seed=2):
            submit(batcher, engine, ids, score_prompt=1)
            submit(batcher, engine, ids, SamplingParams(max_new_tokens=5))
        run(batcher)
    assert not found


def test_an_earlier_prefix_is_not_read_again(engine):
    batcher = Batcher(engine, OPTIONS)
    _, first = submit(batcher, engine, [*range(5, 75)])
    run(batcher)
    longer = [*range(5, 75), *first.ids, 9, 8]
    job, second = submit(batcher, engine, longer)
    other, third = submit(batcher, engine, [*range(5, 30), 99])
    run(batcher)
    assert job.row.stats.reused_tokens == 70 + len(first.ids) - 1
    assert job.row.stats.prefill_tokens == 3 and other.row.stats.reused_tokens == 0
    for ids, heard in ((longer, second), ([*range(5, 30), 99], third)):
        assert heard.ids == list(alone(engine, ids, SIMPLE).output_ids)
    assert batcher.stats.reused_tokens == job.row.stats.reused_tokens


def test_a_cancelled_request_frees_its_slot_at_once(engine):
    batcher = Batcher(engine, BatchOptions(slots=1, size=128, tokens_per_prefill=64))
    long = SamplingParams(temperature=0, max_new_tokens=100)
    job, heard = submit(batcher, engine, [5, 6], long)
    _, waiting = submit(batcher, engine, [7, 8])
    _, never = submit(batcher, engine, [9], deadline=0.0)
    for _ in range(4):
        batcher.step()
    batcher.cancel(job)
    batcher.cancel(job)
    told = len(heard)
    assert heard.last.reason == "cancelled" and never.last.reason == "deadline"
    assert run(batcher) < 15 and len(heard) == told
    assert waiting.ids == list(alone(engine, [7, 8], SIMPLE).output_ids)


def test_a_row_that_is_not_finite_ends_alone():
    """And the row that takes over its slot is right: nothing of it can be seen."""
    weights = toy_params()
    damaged = {**weights, "embed": weights["embed"].at[77].set(np.nan)}
    engine = toy_engine(damaged, max_length=128)
    batcher = Batcher(engine, BatchOptions(slots=2, size=128, tokens_per_prefill=64))
    _, bad = submit(batcher, engine, [5, 77, 6])
    _, good = submit(batcher, engine, [5, 6, 7])
    _, late = submit(batcher, engine, [8, 9])
    _, again = submit(batcher, engine, [5, 77, 6, 7])
    run(batcher)
    assert bad.last.reason == again.last.reason == "not_finite"
    assert "NaN or Inf" in bad.last.error.what
    assert good.ids == list(alone(engine, [5, 6, 7], SIMPLE).output_ids)
    assert late.ids == list(alone(engine, [8, 9], SIMPLE).output_ids)


def test_log_probabilities_of_the_prompt(engine):
    batcher = Batcher(engine, OPTIONS)
    ids = np.random.default_rng(3).integers(3, 600, 90).tolist()  # in two parts
    submit(batcher, engine, ids[:50])
    run(batcher)
    job, _ = submit(batcher, engine, ids, score_prompt=2)
    short, _ = submit(batcher, engine, ids[:3], score_prompt=0)
    single, _ = submit(batcher, engine, ids[:1], score_prompt=0)
    run(batcher)
    logits, _ = forward(TOY, toy_params(), jnp.array([ids]))
    want = np.asarray(jax.nn.log_softmax(logits[0, :-1]))
    chosen = want[np.arange(89), ids[1:]]
    assert job.row.stats.reused_tokens == 0
    assert [one.token for one in job.prompt_logprobs] == ids[1:]
    np.testing.assert_allclose([one.logprob for one in job.prompt_logprobs], chosen, atol=1e-4)
    best = np.sort(want, axis=-1)[:, :-3:-1]
    np.testing.assert_allclose(
        [[value for _, value in one.top] for one in job.prompt_logprobs], best, atol=1e-4
    )
    assert [one.top for one in short.prompt_logprobs] == [(), ()] and not single.prompt_logprobs


def test_the_same_to_the_last_bit_alone_and_among_others():
    """In bfloat16, with log-probabilities; also where full parts of the prompt are reused."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy_params())
    engine = toy_engine(params, max_length=128)
    options = BatchOptions(slots=4, size=128, tokens_per_prefill=64, deterministic=True)
    sampling = SamplingParams(temperature=1, top_p=0.9, logprobs=2, max_new_tokens=9)

    def answer(others: int) -> list:
        batcher = Batcher(engine, options)
        for number, ids in enumerate(prompts(others, seed=5)):
            submit(batcher, engine, ids, SamplingParams(max_new_tokens=7), draw=number)
            batcher.step()
        same = [submit(batcher, engine, [*range(9, 109)], sampling)[1]]
        run(batcher)
        job, heard = submit(batcher, engine, [*range(9, 109)], sampling)
        run(batcher)
        assert job.row.stats.reused_tokens == 64  # the full part, and no more
        return [one.last.completion for one in (*same, heard)]

    first, second = answer(0)
    assert first == second
    assert answer(11) == [first, first]


def test_an_error_of_the_device_ends_the_requests_and_not_the_batcher(engine):
    with failing(engine, 3, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")):
        batcher = Batcher(engine, OPTIONS)
        _, heard = submit(batcher, engine, [5, 6])
        run(batcher)
    assert isinstance(heard.last, Failure) and heard.last.reason == "device"
    assert "out of device memory: 4 slots of 128 tokens" in str(heard.last.error)
    _, next_ = submit(batcher, engine, [5, 6])
    run(batcher)
    assert next_.ids == list(alone(engine, [5, 6], SIMPLE).output_ids)


def test_rows_of_several_adapters_in_one_batch(engine):
    """And of the base model; a prefix of one adapter is not reused by another."""
    adapters = [
        jax.tree.map(
            lambda x, n=rank: x + 0.05 * n,
            init_lora(TOY, jax.random.key(rank), rank=rank, alpha=8, targets="all-linear"),
        )
        for rank in (2, 3)
    ]
    joined = toy_engine(with_lora(toy_params(), join_adapters(adapters)), max_length=128)
    apart = [toy_engine(with_lora(toy_params(), one), max_length=128) for one in adapters]
    batcher, ids = Batcher(joined, OPTIONS), [*range(5, 40)]
    for _ in range(2):
        heard = [submit(batcher, joined, ids, adapter=number)[1] for number in (0, 1, 2, 1)]
        run(batcher)
        want = [list(alone(one, ids, SIMPLE).output_ids) for one in (engine, *apart, apart[0])]
        assert [one.ids for one in heard] == want
    assert want[0] != want[1] != want[2]
    assert alone(joined, ids, SIMPLE).output_ids == tuple(want[0])  # a plain call: the base model
