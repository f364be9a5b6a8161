"""Speculative decoding: the tokens of plain steps, in fewer passes."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from glm2_jax import Tokenizer, forward
from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.limits import DRAFT
from infer import console
from infer.engine import call as job
from infer.engine.drafts import Drafts, Text
from infer.engine.params import SamplingParams
from infer.engine.session import Session
from infer.engine.stats import add_stats
from infer.generate.__main__ import main as generate_main
from tests.support.engine_toy import (
    TOY,
    compilations,
    finished,
    streamed,
    toy_engine,
    toy_params,
    warm_engine,
)

N = 4
GREEDY = SamplingParams(temperature=0, max_new_tokens=40)
COPY = [7, 300, 21, 9, 55, 80, 7, 300, 21, 9, 55, 80, 7, 300]
PROMPTS = [[5, 6, 7], [9], list(range(10, 70)), COPY]


@pytest.fixture(scope="module")
def plain():
    return toy_engine(parrot(), share=warm_engine())


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


def test_a_draft_is_what_followed_the_longest_match():
    assert Text([1, 2, 3, 9, 8, 2, 3, 5, 1, 2, 3]).draft(3) == [9, 8, 2]  # not the later 5
    assert Text([4, 2, 3, 9, 8, 2, 3, 5, 1, 2, 3]).draft(3) == [5, 1, 2]  # the latest of equals
    assert Text([3, 7, 6, 1, 3]).draft(2) == [7, 6]
    assert Text([1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]  # goes on with itself
    assert Text([1, 1]).draft(3) == [1, 1, 1]
    assert Text([1, 2, 3]).draft(2) is None  # nothing was there before
    assert Text([5]).draft(2) is None


def test_a_draft_is_that_of_a_plain_search():
    ids = np.random.default_rng(0).integers(0, 4, 60).tolist()
    for end in range(1, len(ids) + 1):
        text = ids[:end]
        expected = None
        for size in (3, 2, 1):
            places = [i for i in range(size, end) if text[i - size : i] == text[end - size :]]
            if expected is None and places:
                expected = text[places[-1] :]
        assert Text(text).draft(5) == (expected and (expected * 5)[:5])


def test_rows_that_have_ended_draft_nothing():
    drafts = Drafts([[1, 2, 1], [4, 5, 4], [6, 7]], 2)
    found = drafts.next(np.array([True, False, True, False]))
    assert found is not None and found.dtype == np.int32
    assert found.tolist() == [[2, 1], [0, 0], [0, 0], [0, 0]]
    assert drafts.next(np.array([False, False, True, False])) is None


SETTINGS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.3, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.05},
]


def test_the_same_tokens_as_without(plain, engine):
    for seed, setting in enumerate([*SETTINGS, *SETTINGS]):
        sampling = SamplingParams(max_new_tokens=40, seed=seed, **setting)
        expected = plain.complete(PROMPTS, sampling)
        assert engine.complete(PROMPTS, sampling) == expected
        assert streamed(engine, PROMPTS, sampling) == expected
        assert engine.complete([COPY], sampling, row_ids=[3]) == [expected[3]]


def test_many_random_prompts(plain, engine):
    rng = np.random.default_rng(1)
    accepted = 0
    for seed in range(6):
        words = rng.integers(3, 640, 4).tolist()
        prompts = [rng.choice(words, rng.integers(1, 60)).tolist() for _ in range(4)]
        sampling = SamplingParams(temperature=0.5 * (seed % 3), max_new_tokens=40, seed=seed)
        answers = engine.complete(prompts, sampling)
        assert answers == plain.complete(prompts, sampling)
        accepted += sum(answer.stats.accepted_tokens for answer in answers)
    assert accepted > 50


def test_fewer_passes_and_what_is_counted(engine, monkeypatch):
    names, call = [], engine.programs.call
    monkeypatch.setattr(
        engine.programs, "call", lambda *a, **k: (names.append(a[0]), call(*a, **k))[1]
    )
    (completion,) = engine.complete([COPY], GREEDY)
    stats = completion.stats
    assert stats.decode_tokens == len(completion.output_ids) - 1 == 39
    assert stats.passes < 30
    assert 0 < stats.drafted_tokens < N * stats.passes  # some passes had nothing to verify
    assert stats.accepted_tokens == stats.decode_tokens - stats.passes
    assert names[0] == "prefill" and set(names[1:]) == {"verify", "decode"}
    assert len(names) == 1 + stats.passes and names.count("verify") * N == stats.drafted_tokens


def test_log_probabilities(plain, engine):
    sampling = dataclasses.replace(GREEDY, temperature=0.5, logprobs=3)
    for ours, theirs in zip(
        engine.complete(PROMPTS, sampling), plain.complete(PROMPTS, sampling), strict=True
    ):
        assert ours.output_ids == theirs.output_ids
        assert [entry.token for entry in ours.logprobs] == list(ours.output_ids)
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-4)


def test_an_end_token_among_accepted_ones(plain, engine):
    ids = plain.complete([COPY], GREEDY)[0].output_ids
    for place in (12, 15, 18):
        ending, speculating = (
            toy_engine(parrot(), share=plain),
            toy_engine(parrot(), share=plain, speculate=N),
        )
        ending._stop_ids = speculating._stop_ids = (ids[place],)
        expected = ending.complete(PROMPTS, GREEDY)
        assert speculating.complete(PROMPTS, GREEDY) == expected
        assert streamed(speculating, PROMPTS, GREEDY) == expected
        assert expected[3].finish_reason == "stop"
    events = list(speculating.run([COPY], GREEDY))
    assert events[-1].token is None and events[-1].finish_reason == "stop"


def test_a_stop_string_among_accepted_ones(plain, engine):
    text = plain.complete([COPY], GREEDY)[0].text
    for start in (2, 5, 8):
        sampling = dataclasses.replace(GREEDY, stop=(text[start : start + 3],))
        expected = plain.complete(PROMPTS, sampling)
        assert engine.complete(PROMPTS, sampling) == expected
        assert expected[3].finish_reason == "stop"


def test_a_loop_and_a_cache_that_grows(plain, engine, monkeypatch):
    monkeypatch.setattr(job, "ROOM", 8)
    sampling = SamplingParams(temperature=0, loop_stop=2)
    expected = plain.complete([COPY], sampling)
    answers = engine.complete([COPY], sampling)
    assert answers == expected
    assert expected[0].finish_reason == "loop" and len(expected[0].output_ids) > 128
    assert ("grow", (1, 64, 256)) in engine.programs._programs
    assert answers[0].stats.passes < 100  # of 207 tokens


def test_up_to_the_last_slot(plain, engine):
    """Drafts that exceed the cache, which has as many slots as the longest text."""
    short, speculating = (
        toy_engine(parrot(), share=plain, max_length=64, speculate=n) for n in (0, N)
    )
    for length in (20, 58, 60, 62, 63):
        ids, sampling = (COPY * 5)[:length], SamplingParams(temperature=0)
        expected = short.complete([ids], sampling)
        assert speculating.complete([ids], sampling) == expected
        assert len(expected[0].output_ids) == 64 - length


def test_every_row_has_its_own_limit(plain, engine):
    sampling = SamplingParams(temperature=0, max_length=70)
    expected = plain.complete(PROMPTS, sampling)
    assert engine.complete(PROMPTS, sampling) == expected
    assert [len(c.output_ids) for c in expected] == [67, 69, 10, 56]
    one = SamplingParams(temperature=0, max_new_tokens=1)
    answers = engine.complete(PROMPTS, one)
    assert answers == plain.complete(PROMPTS, one)
    assert answers[0].stats.passes == 0


def test_nan_is_told_at_its_step(plain, engine):
    ids = plain.complete([COPY], GREEDY)[0].output_ids
    step = next(n for n in range(4, 40) if ids[n] not in (*ids[:n], *COPY))
    weights = parrot()
    embed = np.array(weights["embed"])
    embed[ids[step]] = np.nan
    damaged = {**weights, "embed": jax.numpy.asarray(embed)}
    for draft in (0, N):
        events = toy_engine(damaged, share=plain, speculate=draft).run([COPY], GREEDY)
        assert [next(events).token for _ in range(step + 1)] == list(ids[: step + 1])
        with pytest.raises(CheckpointError, match=f"NaN or Inf at step {step + 2} "):
            next(events)


def test_drawn_as_the_model_says(engine):
    """Chi-square of the first three tokens of many rows against their exact probabilities."""
    top, rows, temperature, batch = 3, 2048, 6.0, len(PROMPTS)
    prompt, prefixes = [*range(8, 16), *range(8, 11)], [[]]
    exact, model = np.ones(1), jax.jit(forward, static_argnums=0)
    for count in range(3):  # a level of the tree: the three likeliest after each prefix
        tokens = np.zeros((top**2, len(prompt) + 2), np.int32)  # of one shape: compiled once
        for row, prefix in zip(tokens, prefixes, strict=False):
            row[: len(prompt) + count] = prompt + prefix
        logits = model(TOY, parrot(), tokens)[0][: len(prefixes), len(prompt) + count - 1]
        logits = np.asarray(logits, np.float64)
        best = np.argsort(-logits, axis=-1)[:, :top]
        chances = np.exp(np.take_along_axis(logits, best, axis=-1) / temperature)
        chances /= chances.sum(axis=-1, keepdims=True)
        prefixes = [[*p, int(t)] for p, row in zip(prefixes, best, strict=True) for t in row]
        exact = (exact[:, None] * chances).reshape(-1)
    sampling = SamplingParams(
        temperature=temperature, top_k=top, top_p=1.0, max_new_tokens=3, seed=11
    )
    counts = dict.fromkeys(map(tuple, prefixes), 0)
    accepted = 0
    for start in range(0, rows, batch):
        ids = range(start, start + batch)
        for completion in engine.complete([prompt] * batch, sampling, row_ids=ids):
            counts[completion.output_ids] += 1
            accepted += completion.stats.accepted_tokens
    assert 0.1 < accepted / rows < 0.9  # of the one draft that counts: both ways are taken often

    assert rows * exact.min() > 5

    def chi_square(chances):
        expected = rows * chances
        return np.sum((np.array(list(counts.values())) - expected) ** 2 / expected)

    # 26 degrees of freedom: above 54.1 in one of a thousand.
    assert chi_square(exact) < 54.1
    colder = exact**1.3 / np.sum(exact**1.3)
    assert chi_square(colder) > 54.1  # the test sees a small error


def test_an_answer_that_is_left_or_interrupted_leaves_the_engine_usable(plain, engine, monkeypatch):
    events = engine.run(PROMPTS, GREEDY)
    for _ in range(9):
        next(events)
    events.close()
    call, count = engine.programs.call, itertools.count(1)

    def interrupted(*args, **kwargs):
        if next(count) == 3:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    monkeypatch.setattr(engine.programs, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(engine.run(PROMPTS, GREEDY))
    monkeypatch.undo()
    assert streamed(engine, PROMPTS, GREEDY) == plain.complete(PROMPTS, GREEDY)


@pytest.mark.parametrize("left_at", [None, 4])
def test_a_session_goes_on_after_rewinding(plain, engine, left_at):
    """Every turn against one that reads all of its prompt again, without drafts."""
    session, ids, read = Session(engine), COPY, []
    for turn in range(4):
        sampling = dataclasses.replace(GREEDY, temperature=0.7 * (turn % 2), max_new_tokens=14)
        expected = finished(plain.run([ids], sampling))
        events = session.run(ids, sampling)
        tokens = [event.token for event in itertools.islice(events, left_at)]
        events.close()
        assert tokens == list(expected.output_ids[:left_at])
        read.append(events.stats.prefill_tokens)
        ids = [*ids, *tokens, 100 + turn]
    # Of an answer only the last token is not in the cache, if it is the last that was computed.
    assert read[0] == len(COPY) and all(new in (1, 2) for new in read[1:])


def test_a_session_after_a_stop_string_and_an_edit(plain, engine):
    session = Session(engine)
    whole = finished(session.run(COPY, GREEDY))
    sampling = dataclasses.replace(GREEDY, stop=(whole.text[5:8],))
    stopped = finished(session.run(COPY, sampling))
    assert stopped.finish_reason == "stop"
    for ids in ([*COPY, *stopped.output_ids, 4], COPY[:9], [*COPY[:9], *whole.output_ids]):
        assert finished(session.run(ids, GREEDY)) == finished(plain.run([ids], GREEDY))


def test_nothing_recompiles_once_warm():
    engine = toy_engine(parrot(), speculate=N)
    engine.complete([COPY], SamplingParams(max_new_tokens=20))
    assert engine.programs.compiled == 3  # prefill, verify, decode
    others = GREEDY, SamplingParams(repetition_penalty=1.3, logprobs=5), SamplingParams(seed=9)
    with compilations() as counted:
        for sampling in others:
            for ids, limit in (([8], 20), (COPY[:5], 3)):
                limited = dataclasses.replace(sampling, max_new_tokens=limit)
                engine.complete([ids], limited)
                list(engine.run([ids], limited))
    assert engine.programs.compiled == 3 and not counted
    cache = 2 * TOY.num_layers * 64 * TOY.num_kv_heads * TOY.head_dim * 4
    memory = engine.programs._programs["verify", (1, 64, N)].memory_analysis()
    assert memory.alias_size_in_bytes >= cache


def test_bad_numbers(capsys):
    for bad in (-1, DRAFT + 1, 1.5, True, "4", 10**30):
        with pytest.raises(UsageError, match=f"speculate must be a whole number, 0 to {DRAFT}"):
            toy_engine(speculate=bad)
    for bad in ("-1", str(DRAFT + 1), "x", "9" * 5000):
        with pytest.raises(SystemExit) as caught:
            generate_main([f"--speculate={bad}"])
        assert caught.value.code == 2 and "--speculate" in capsys.readouterr().err


def test_what_stats_say(capsys, engine):
    (completion,) = engine.complete([COPY], GREEDY)
    stats = completion.stats
    console.print_stats(1.0, stats)
    told = capsys.readouterr().err
    tokens = f"{stats.accepted_tokens} of {stats.drafted_tokens} draft tokens accepted"
    assert tokens in told and f"{39 / stats.passes:.2f} tokens a pass" in told
    total = add_stats(stats, stats)
    assert total.passes == 2 * stats.passes
    console.print_stats(1.0, dataclasses.replace(stats, passes=0))
    assert "speculation" not in capsys.readouterr().err


def test_the_flag_reaches_the_engine(capsys):
    flags = ["-p", "你好", "--greedy", "--max-new-tokens", "6", "--device", "cpu", "--json"]
    answers = []
    for draft in ("0", "3"):
        assert generate_main([*flags, "--stats", "--speculate", draft]) == 0
        out, err = capsys.readouterr()
        answers.append(out)
        assert ("draft tokens accepted" in err) == (draft == "3")
    assert answers[0] == answers[1]
