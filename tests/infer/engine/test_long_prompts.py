"""Prompts read in parts, and caches that grow: the same answers, from few programs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import KVCache, compiler_options, init_params
from glm2_jax.model import unstack_layers
from glm2_jax.runtime import buckets
from glm2_jax.runtime.buckets import bucket, grown
from glm2_jax.runtime.xla import cache_dtype
from infer.engine import call as job
from infer.engine import steps
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.engine.parts import parts
from infer.engine.session import Session
from tests.support.engine_toy import TOY, compilations, streamed, toy_engine, warm_engine

LONG = [list(range(10, 160)), [9, 8], list(range(200, 264)), [7] * 66]
GREEDY = SamplingParams(temperature=0, max_new_tokens=5)


@pytest.fixture(scope="module")
def engine():
    return toy_engine(share=warm_engine())


def names(engine: Engine) -> list[str]:
    return sorted(name for name, _ in engine.programs._programs)


def joined(split, row: int) -> list[int]:
    return [int(i) for part in split for i in part.tokens[row, : part.lengths[row]]]


@pytest.mark.parametrize(("kept", "longest"), [(0, 40), (0, 150), (1, 7), (2, 1), (0, 200)])
def test_parts_hold_every_token_once_and_all_prompts_end_in_the_last(kept, longest):
    prompts = [ids if len(ids) > kept else [*ids, 1] for ids in LONG]
    split = parts(prompts, kept, 4, longest)
    assert len(split) == -(-(150 - kept) // longest)
    assert {part.tokens.shape[1] for part in split[:-1]} <= {longest}
    assert split[-1].tokens.shape[1] <= longest and (split[-1].lengths > 0).all()
    for row, ids in enumerate(prompts):
        assert joined(split, row) == ids[kept:]
        before = kept + np.cumsum([0, *(part.lengths[row] for part in split)])
        assert [part.kept[row] for part in split] == before[:-1].tolist()


def test_rows_beyond_the_prompts_are_empty():
    (part,) = parts([[5, 6], [7], [8]], 0, 4, 64)
    assert part.tokens.shape == (4, 64) and part.lengths.tolist() == [2, 1, 1, 0]


def test_reading_in_parts_changes_no_answer(engine):
    whole = engine.complete(LONG, GREEDY)
    in_parts = toy_engine(share=engine, prefill_chunk=96)
    assert in_parts.complete(LONG, GREEDY) == whole
    answers = streamed(in_parts, LONG, GREEDY)
    assert answers == whole
    assert [answer.stats.prefill_tokens for answer in answers] == list(map(len, LONG))


def test_all_full_parts_are_one_program():
    engine = toy_engine(prefill_chunk=16)
    engine.complete([list(range(10, 160))], GREEDY)
    assert names(engine) == ["decode_many", "extend", "read"]
    engine.complete([list(range(10, 152))], GREEDY)
    assert len(names(engine)) == 3
    memory = next(p for (n, _), p in engine.programs._programs.items() if n == "read")
    cache = 2 * 2 * 256 * 2 * 8 * 4
    assert memory.memory_analysis().alias_size_in_bytes >= cache


def test_a_session_reads_in_parts(engine):
    in_parts = Session(toy_engine(share=engine, prefill_chunk=16))
    for ids in (LONG[0], [*LONG[0][:100], *LONG[2]]):
        (want,) = engine.complete([ids], GREEDY)
        events = list(in_parts.run(ids, GREEDY))
        assert events[-1].completion == want
    assert want.stats.reused_tokens == 0 and events[-1].completion.stats.reused_tokens == 100


def test_growing_changes_no_answer_and_nothing_recompiles_once_warm(engine, monkeypatch):
    sampling = SamplingParams(temperature=0.9, top_p=1.0, max_new_tokens=34, seed=5)
    prompts = [[5, 6, 7], [300, 4, 300, 4, 21, 9, 9]]
    whole = engine.complete(prompts, sampling)
    monkeypatch.setattr(buckets, "SMALLEST_BUCKET", 16)  # the cache begins with 16 slots, ...
    monkeypatch.setattr(job, "ROOM", 4)  # ... of which 4 at least are for the answers
    small = toy_engine()

    assert streamed(small, prompts, sampling) == small.complete(prompts, sampling) == whole
    keys = sorted((name, key[-1]) for name, key in small.programs._programs)
    steps_of = [("decode", 16), ("decode", 64), ("decode_many", 64)]
    assert keys == [*steps_of, ("grow", 64), ("prefill", 16)]
    with compilations() as counted:
        assert streamed(small, prompts, sampling) == small.complete(prompts, sampling) == whole
    assert small.programs.compiled == len(keys) and not counted


def test_sizes_of_caches():
    assert [bucket(n, 5000) for n in (1, 64, 65, 4096, 4097, 9000)] == [
        *(64, 64, 128, 4096, 5000, 5000)
    ]
    assert grown(512, 513, 8192) == 2048
    assert grown(512, 2049, 8192) == 8192
    assert grown(512, 513, 1024) == 1024
    assert grown(4096, 4097, 5000) == 5000


def test_a_short_answer_does_not_get_a_long_cache(engine, monkeypatch):
    monkeypatch.setattr(job, "ROOM", 60)
    for limit, sizes in ((20, (64, 64)), (100, (64, 128)), (None, (64, 256))):
        sampling = SamplingParams(temperature=0, max_new_tokens=limit)
        batch = engine.schedule([[5, 6, 7]], sampling).batch
        assert (batch.cache_size, batch.largest_cache) == sizes


@pytest.mark.parametrize("layers", ["stacked", "list"])
def test_half_precision_on_a_cpu_copies_no_cache(layers):
    """XLA:CPU of jax 0.10 would convert all of it to float32 and back, in every layer."""
    config = dataclasses.replace(TOY, num_layers=6)

    def arrays():
        params = init_params(config, jax.random.key(0), jnp.bfloat16)
        cache = KVCache.zeros(config, 2, 2**14, cache_dtype("cpu", jnp.bfloat16))
        return unstack_layers(params) if layers == "list" else params, cache

    params, cache = jax.eval_shape(arrays)
    row = np.ones(2, np.int32)
    jitted = jax.jit(
        partial(steps.read, config), donate_argnums=4, compiler_options=compiler_options("cpu")
    )
    lowered = jitted.lower(params, row[:, None], row, row, cache)
    memory = lowered.compile().memory_analysis()
    keys = cache.k.size * cache.k.dtype.itemsize
    assert memory.alias_size_in_bytes >= 2 * keys
    assert memory.temp_size_in_bytes < 3 * keys / config.num_layers  # of a layer, both
