"""The executor and its programs, handed arrays: no call, no text."""

from functools import partial

import jax
import numpy as np
import pytest

from glm2_jax import forward
from infer.engine.executor import Executor
from infer.engine.params import SamplingParams
from infer.engine.parts import parts
from infer.engine.programs import Made
from infer.engine.sampling import Sampling, seed_words
from infer.engine.steps import IDLE, Controls
from tests.support.engine_toy import TOY, toy_params, warm_engine

PROMPTS = [[5, 6, 7], [300, 4, 300, 4, 21]]
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def executor():
    return Executor(TOY, toy_params(), warm_engine().programs)


def controls(*rows: SamplingParams, draws=(0, 1), limit=100):
    return Controls(
        sampling=Sampling.of(rows, 2),
        seed=np.array([seed_words(row.seed) for row in rows]),
        row_ids=np.array(draws, np.int32),
        limit=np.full(2, limit, np.int32),
        stop_ids=np.array([2], np.int32),
        want_logprobs=np.array([row.logprobs is not None for row in rows]),
    )


def answers(executor, asked, count=8, keep=(True, True)):
    """int32 [count, 2]: the tokens of two rows, of which `keep` go on after the first."""
    (part,) = parts(PROMPTS, 0, 2, 64)
    state, output = executor.prefill(part, 64, asked)
    tokens = [output.tokens]
    for _ in range(count - 1):
        state, output = executor.decode(asked, np.array(keep), state)
        tokens.append(output.tokens)
    return np.array(tokens)


@pytest.fixture(scope="module")
def greedy(executor):
    return answers(executor, controls(GREEDY, GREEDY))


def test_prefill_and_decode_equal_the_plain_forward(greedy):
    for row, ids in enumerate(PROMPTS):
        text = np.array([[*ids, *greedy[:, row]]])
        logits = jax.jit(partial(forward, TOY))(toy_params(), text)[0][0]
        assert np.argmax(logits[len(ids) - 1 : -1], axis=-1).tolist() == greedy[:, row].tolist()


def test_a_row_that_is_released_leaves_the_other_alone(executor, greedy):
    tokens = answers(executor, controls(GREEDY, GREEDY), keep=(False, True))
    assert (tokens[1:, 0] == IDLE).all() and tokens[:, 1].tolist() == greedy[:, 1].tolist()
    short = answers(executor, controls(GREEDY, GREEDY, limit=3))
    assert short[:3].tolist() == greedy[:3].tolist() and (short[3:] == IDLE).all()


def test_rows_of_one_batch_differ_in_seed_and_sampling(executor, greedy):
    hot = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    one, two = (SamplingParams(**hot, seed=seed) for seed in (3, 2**33 + 4))
    both = answers(executor, controls(one, two))
    assert answers(executor, controls(one, GREEDY))[:, 0].tolist() == both[:, 0].tolist()
    assert answers(executor, controls(GREEDY, two))[:, 1].tolist() == both[:, 1].tolist()
    assert answers(executor, controls(one, GREEDY))[:, 1].tolist() == greedy[:, 1].tolist()
    assert answers(executor, controls(two, two))[:, 0].tolist() != both[:, 0].tolist()
    assert answers(executor, controls(one, two, draws=(9, 1)))[:, 0].tolist() != both[:, 0].tolist()


def test_log_probabilities_of_a_batch_in_which_one_row_wants_them(executor):
    (part,) = parts(PROMPTS, 0, 2, 64)
    for wanted in (None, 1):
        asked = controls(GREEDY, SamplingParams(temperature=0, logprobs=wanted))
        _, output = executor.prefill(part, 64, asked)
        assert bool(np.any(output.logprobs.chosen)) == (wanted is not None)


def test_the_loop_on_the_device_takes_the_same_steps(executor, greedy):
    asked, keep = controls(GREEDY, GREEDY, limit=8), np.ones(2, bool)
    (part,) = parts(PROMPTS, 0, 2, 64)
    state, _ = executor.prefill(part, 64, asked)
    _, output = executor.decode(asked, keep, state, count=32)
    assert np.array(output.tokens[:7]).tolist() == greedy[1:].tolist()
    assert (np.array(output.tokens[7:]) == IDLE).all()


def test_parts_and_a_cache_that_grows_change_no_token(executor, greedy):
    asked, seen = controls(GREEDY, GREEDY), np.zeros((2, TOY.vocab_size), bool)
    *full, last = parts(PROMPTS, 0, 2, 4)
    cache = executor.new_cache(2, 64)
    for part in full:
        cache = executor.read(part, cache)
    state, output = executor.extend(last, seen, asked, cache)
    cache = executor.grow(state.cache, 65, 256)
    assert cache.size == executor.room(cache) == 256 and executor.grow(cache, 65, 256) is cache
    tokens = [output.tokens]
    state = state._replace(cache=cache)
    for _ in range(3):
        state, output = executor.decode(asked, np.ones(2, bool), state)
        tokens.append(output.tokens)
    assert np.array(tokens).tolist() == greedy[:4].tolist()


def test_what_is_compiled_ahead_runs_nothing_and_is_counted():
    told, made = [], Made()
    executor = Executor(TOY, toy_params(), on_event=lambda *event: told.append(event))
    (part,) = parts([[5]], 0, 1, 64)
    row = jax.tree.map(lambda x: x[:1], controls(GREEDY, GREEDY))._replace(stop_ids=np.array([2]))

    def begin(traced):
        assert isinstance(traced.new_cache(1, 64).k, jax.ShapeDtypeStruct)
        _, output = traced.prefill(part, 64, row)
        assert output.tokens.shape == (1,) and isinstance(output.tokens, jax.ShapeDtypeStruct)

    for _ in range(2):
        executor.compile_ahead("key", begin, made)
    assert told == [("compile", "compiling prefill 64 (1/1)")]
    assert (made.programs, executor.programs.compiled) == (1, 1) and made.seconds > 0
    later = Made()
    executor.counting(later).prefill(part, 64, row)
    assert (later.programs, later.seconds) == (0, 0.0)
    assert executor.programs.seconds == pytest.approx(made.seconds, rel=0.1)
