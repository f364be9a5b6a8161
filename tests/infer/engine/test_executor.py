"""The executor and its programs, handed arrays, and the parts that prompts are cut into."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import KVCache, compiler_options, init_params
from glm2_jax.model import unstack_layers
from glm2_jax.runtime.buckets import bucket, grown
from glm2_jax.runtime.xla import cache_dtype
from infer.engine import steps
from infer.engine.call import parts
from infer.engine.executor import Executor
from infer.engine.params import SamplingParams
from infer.engine.sampling import Sampling
from infer.engine.steps import IDLE, STOP_IDS, Controls, Part
from tests.support.engine_toy import TOY, toy_params, warm_engine

PROMPTS = [[5, 6, 7], [300, 4, 300, 4, 21]]
LONG = [list(range(10, 160)), [9, 8], list(range(200, 264)), [7] * 66]


@pytest.fixture(scope="module")
def executor():
    return Executor(TOY, toy_params(), warm_engine().programs)


def controls(limit=100):
    """What two greedy rows ask for."""
    return Controls(
        sampling=Sampling.of([SamplingParams(temperature=0)] * 2),
        seed=np.zeros((2, 2), np.uint32),
        row_ids=np.arange(2, dtype=np.int32),
        limit=np.full(2, limit, np.int32),
        stop_ids=np.full((2, STOP_IDS), 2, np.int32),
        want_logprobs=np.zeros(2, bool),
    )


def counts(rows=2):
    return np.zeros((rows, TOY.vocab_size), np.int16)


def answers(executor, asked, count=8, keep=(True, True)):
    """int32 [count, 2]: the tokens of two rows; `keep`, [2] or [count - 1, 2]: who takes part."""
    (part,) = parts(PROMPTS, 0, 2, 64)
    state, output = executor.prefill(part, 64, counts(), asked)
    tokens = [output.tokens]
    for takes_part in np.broadcast_to(keep, (count - 1, 2)):
        state, output = executor.decode(asked, takes_part.copy(), state)
        tokens.append(output.tokens)
    return np.array(tokens)


@pytest.fixture(scope="module")
def greedy(executor):
    return answers(executor, controls())


def test_a_row_that_sits_out_goes_on_later_and_leaves_the_other_alone(executor, greedy):
    tokens = answers(executor, controls(), keep=(False, True))
    assert (tokens[1:, 0] == IDLE).all() and tokens[:, 1].tolist() == greedy[:, 1].tolist()
    turns = np.array([(True, step % 3 == 0) for step in range(7)])  # it sits out two steps
    tokens = answers(executor, controls(), keep=turns)
    assert tokens[:, 0].tolist() == greedy[:, 0].tolist()
    assert tokens[1:, 1][turns[:, 1]].tolist() == greedy[1:4, 1].tolist()
    assert (tokens[1:, 1][~turns[:, 1]] == IDLE).all()
    short = answers(executor, controls(limit=3))
    assert short[:3].tolist() == greedy[:3].tolist() and (short[3:] == IDLE).all()


def test_parts_and_a_cache_that_grows_change_no_token(executor, greedy):
    asked = controls()
    *full, last = parts(PROMPTS, 0, 2, 4)
    cache = executor.new_cache(2, 64)
    for part in full:
        cache = executor.read(part, cache)
    state, output = executor.extend(last, counts(), asked, cache)
    cache = executor.grow(state.cache, 65, 256)
    assert cache.size == executor.room(cache) == 256 and executor.grow(cache, 65, 256) is cache
    _, after = executor.decode(asked, np.ones(2, bool), state._replace(cache=cache))
    assert np.array([output.tokens, after.tokens]).tolist() == greedy[:2].tolist()


def test_what_is_compiled_ahead_runs_nothing_and_is_counted():
    said = []
    executor = Executor(TOY, toy_params(), on_event=lambda *event: said.append(event))
    one, later = executor.counting(), executor.counting()
    (part,) = parts([[5]], 0, 1, 64)
    row = jax.tree.map(lambda x: x[:1], controls())

    def begin(traced):
        assert isinstance(traced.new_cache(1, 64).k, jax.ShapeDtypeStruct)
        _, output = traced.prefill(part, 64, counts(1), row)
        assert output.tokens.shape == (1,) and isinstance(output.tokens, jax.ShapeDtypeStruct)

    for _ in range(2):
        one.compile_ahead("key", begin)
    assert [text for _, text in said] == ["compiling prefill 64 (1/2)", "compiling pick 1 (2/2)"]
    assert (one.made.programs, executor.programs.compiled) == (2, 2) and one.made.seconds > 0
    later.prefill(part, 64, counts(1), row)
    assert (later.made.programs, later.made.seconds) == (0, 0.0)
    assert executor.programs.seconds == pytest.approx(one.made.seconds, rel=0.1)


@pytest.mark.parametrize(("kept", "longest"), [(0, 40), (0, 150), (1, 7), (2, 1)])
def test_parts_hold_every_token_once_and_all_prompts_end_in_the_last(kept, longest):
    prompts = [ids if len(ids) > kept else [*ids, 1] for ids in LONG]
    split = parts(prompts, kept, 8, longest)
    assert len(split) == -(-(150 - kept) // longest)
    assert {part.tokens.shape[1] for part in split[:-1]} <= {longest}
    assert split[-1].tokens.shape[1] <= longest and (split[-1].lengths[:4] > 0).all()
    for row, ids in enumerate(prompts):
        read = [int(i) for part in split for i in part.tokens[row, : part.lengths[row]]]
        assert read == ids[kept:]
        before = kept + np.cumsum([0, *(part.lengths[row] for part in split)])
        assert [part.kept[row] for part in split] == before[:-1].tolist()
    assert not any(part.lengths[4:].any() for part in split)  # rows beyond the prompts


def test_sizes_of_caches():
    sizes = [bucket(n, 5000) for n in (1, 64, 65, 4096, 4097, 9000)]
    assert sizes == [64, 64, 128, 4096, 5000, 5000]
    assert grown(512, 513, 8192) == 2048 and grown(512, 2049, 8192) == 8192
    assert grown(512, 513, 1024) == 1024


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
        partial(steps.read, config), donate_argnums=2, compiler_options=compiler_options("cpu")
    )
    memory = jitted.lower(params, Part(row[:, None], row, row), cache).compile().memory_analysis()
    keys = cache.k.size * cache.k.dtype.itemsize
    assert memory.alias_size_in_bytes >= 2 * keys
    assert memory.temp_size_in_bytes < 3 * keys / config.num_layers  # of a layer, both
