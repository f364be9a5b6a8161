"""Speculative decoding: the tokens of plain steps, in fewer passes."""

import jax
import numpy as np
import pytest

from glm2_jax import Tokenizer
from infer.params import SamplingParams
from infer.speculate import Drafts, Text
from tests.engine_toy import TOY, toy_engine, toy_params

N = 4
GREEDY = SamplingParams(temperature=0, max_new_tokens=40)
COPY = [7, 300, 21, 9, 55, 80, 7, 300, 21, 9, 55, 80, 7, 300]
PROMPTS = [[5, 6, 7], [9], list(range(10, 70)), COPY]


@pytest.fixture(scope="module")
def plain():
    return toy_engine(parrot())


@pytest.fixture(scope="module")
def engine(plain):
    return toy_engine(parrot(), share=plain, speculate=N)


def parrot():
    """Toy weights that mostly answer a token with the one after it in its group of eight."""
    params = dict(toy_params())
    ids, embed = np.arange(TOY.vocab_size), np.asarray(params["embed"])
    embed = 3 * embed / np.sqrt(np.mean(embed**2, axis=1, keepdims=True))
    head = embed[ids // 8 * 8 + (ids - 1) % 8] / 3
    head[Tokenizer.eos_id] = 0
    return {**params, "embed": jax.numpy.asarray(embed), "head": jax.numpy.asarray(head)}


def streamed(engine, prompts, sampling, **kwargs):
    """What `run` gives, in the form of `complete`."""
    events = engine.run(prompts, sampling, **kwargs)
    done = {event.row: event.completion for event in events if event.completion}
    return [done[row] for row in range(len(prompts))]


def test_a_draft_is_what_followed_the_longest_match():
    assert Text([1, 2, 3, 9, 8, 2, 3, 5, 1, 2, 3]).draft(3) == [9, 8, 2]  # not the later 5
    assert Text([4, 2, 3, 9, 8, 2, 3, 5, 1, 2, 3]).draft(3) == [5, 1, 2]  # the latest of equals
    assert Text([3, 7, 6, 1, 3]).draft(2) == [7, 6]
    assert Text([1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]  # goes on with itself
    assert Text([1, 1]).draft(3) == [1, 1, 1]
    assert Text([1, 2, 3]).draft(2) == [3, 3]  # nothing was there before
    assert Text([5]).draft(2) == [5, 5]


def test_a_draft_is_that_of_a_plain_search():
    ids = np.random.default_rng(0).integers(0, 4, 60).tolist()
    for end in range(1, len(ids) + 1):
        text = ids[:end]
        expected = None
        for size in (3, 2, 1):
            places = [i for i in range(size, end) if text[i - size : i] == text[end - size :]]
            if expected is None and places:
                expected = text[places[-1] :]
        expected = (expected or text[-1:]) * 5
        assert Text(text).draft(5) == expected[:5]


def test_rows_that_have_ended_draft_nothing():
    drafts = Drafts([[1, 2, 1], [4, 5, 4]], 2).next(np.array([True, False, False, False]))
    assert drafts.tolist() == [[2, 1], [0, 0], [0, 0], [0, 0]] and drafts.dtype == np.int32


SETTINGS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.3, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.05},
    {"temperature": 0.7, "top_k": 0, "top_p": 0.5},
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_the_same_tokens_as_without(plain, engine, setting, seed):
    sampling = SamplingParams(max_new_tokens=40, seed=seed, **setting)
    expected = plain.complete(PROMPTS, sampling)
    assert engine.complete(PROMPTS, sampling) == expected
    assert streamed(engine, PROMPTS, sampling) == expected
    for row in (0, 3):
        assert engine.complete([PROMPTS[row]], sampling, row_ids=[row]) == [expected[row]]


def test_many_random_prompts(plain, engine):
    rng = np.random.default_rng(1)
    accepted = 0
    for seed in range(6):
        words = rng.integers(3, 640, 4).tolist()
        prompts = [rng.choice(words, rng.integers(1, 60)).tolist() for _ in range(4)]
        sampling = SamplingParams(temperature=0.5 * (seed % 3), max_new_tokens=40, seed=seed)
        assert engine.complete(prompts, sampling) == plain.complete(prompts, sampling)
        accepted += engine.stats.accepted_tokens
    assert accepted > 50


def test_fewer_passes_and_what_is_counted(plain, engine):
    (completion,) = engine.complete([COPY], GREEDY)
    stats = engine.stats
    assert stats.decode_tokens == len(completion.output_ids) - 1 == 39
    assert stats.passes < 30
    assert stats.drafted_tokens == N * stats.passes
    assert stats.accepted_tokens == stats.decode_tokens - stats.passes
    plain.complete([COPY], GREEDY)
    assert plain.stats.passes == plain.stats.drafted_tokens == plain.stats.accepted_tokens == 0
