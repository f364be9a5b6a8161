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
from infer.engine.drafts import Drafts, Text
from infer.engine.params import SamplingParams
from infer.engine.session import Session
from infer.generate.__main__ import main as generate_main
from tests.support.engine_toy import (
    TOY,
    cache_bytes,
    compilations,
    finished,
    open_toy,
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
    assert Text([1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]  # goes on with itself
    ids = np.random.default_rng(0).integers(0, 4, 60).tolist()
    for end in range(1, len(ids) + 1):
        text, expected = ids[:end], None
        for size in (3, 2, 1):
            places = [i for i in range(size, end) if text[i - size : i] == text[end - size :]]
            if expected is None and places:
                expected = text[places[-1] :]  # the latest of equals
        assert Text(text).draft(5) == (expected and (expected * 5)[:5])
    drafts = Drafts([[1, 2, 1], [4, 5, 4], [6, 7]], 2)
    found = drafts.next(np.array([True, False, True, False]))  # one row has ended, one finds none
    assert found is not None and found.dtype == np.int32
    assert found.tolist() == [[2, 1], [0, 0], [0, 0], [0, 0]]
    assert drafts.next(np.array([False, False, True, False])) is None


SETTINGS = {
    "greedy": {"temperature": 0},
    "penalty": {"temperature": 0, "repetition_penalty": 1.3},
    "everything": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "filtered": {"temperature": 0.3, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.05},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_tokens_as_without_and_in_parts(plain, engine, name):
    sampling = SamplingParams(**{"max_new_tokens": 40, "seed": 5} | SETTINGS[name])
    expected = plain.complete(PROMPTS, sampling)
    in_parts = toy_engine(parrot(), share=plain, speculate=N, prefill_chunk=96)
    for one in (engine, in_parts):
        assert one.complete(PROMPTS, sampling) == streamed(one, PROMPTS, sampling) == expected
    assert engine.complete([COPY], sampling, row_ids=[3]) == [expected[3]]


def test_fewer_passes_and_what_is_counted(engine, monkeypatch, capsys):
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
    models, draws = names[::2], names[1::2]
    assert models[0] == "prefill" and set(models[1:]) == {"verify", "decode"}
    assert draws == ["accept" if name == "verify" else "pick" for name in models]
    assert len(models) == 1 + stats.passes and models.count("verify") * N == stats.drafted_tokens
    console.print_stats(1.0, stats)
    printed = capsys.readouterr().err
    accepted = f"{stats.accepted_tokens} of {stats.drafted_tokens} draft tokens accepted"
    assert accepted in printed and f"{39 / stats.passes:.2f} tokens a pass" in printed


def test_log_probabilities_and_limits_of_rows(plain, engine):
    limits = (1, 2, 40, 7)
    sampling = [
        dataclasses.replace(GREEDY, temperature=0.5, logprobs=3, max_new_tokens=limit)
        for limit in limits
    ]
    answers = engine.complete(PROMPTS, sampling)
    assert [len(answer.output_ids) for answer in answers] == list(limits)
    assert answers[0].stats.passes == 0
    for ours, theirs in zip(answers, plain.complete(PROMPTS, sampling), strict=True):
        assert ours.output_ids == theirs.output_ids
        assert [entry.token for entry in ours.logprobs] == list(ours.output_ids)
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-4)


def test_nan_names_its_step(plain):
    ids = plain.complete([COPY], GREEDY)[0].output_ids
    step = next(n for n in range(4, 40) if ids[n] not in (*ids[:n], *COPY))
    weights = parrot()
    damaged = {**weights, "embed": weights["embed"].at[ids[step]].set(np.nan)}
    for draft in (0, N):
        events = toy_engine(damaged, share=plain, speculate=draft).run([COPY], GREEDY)
        assert [next(events).token for _ in range(step + 1)] == list(ids[: step + 1])
        with pytest.raises(CheckpointError, match=f"NaN or Inf at step {step + 2} "):
            next(events)


def test_an_end_token_or_a_stop_string_among_accepted_ones(plain, engine):
    (whole,) = plain.complete([COPY], GREEDY)
    for place in (12, 15):
        pair = [toy_engine(parrot(), share=plain, speculate=draft) for draft in (0, N)]
        for one in pair:
            one.stop_ids = (whole.output_ids[place],)
        expected = pair[0].complete(PROMPTS, GREEDY)
        assert pair[1].complete(PROMPTS, GREEDY) == streamed(pair[1], PROMPTS, GREEDY) == expected
        assert expected[3].finish_reason == "stop"
    for start in (2, 5):
        sampling = dataclasses.replace(GREEDY, stop=(whole.text[start : start + 3],))
        expected = plain.complete(PROMPTS, sampling)
        assert engine.complete(PROMPTS, sampling) == expected
        assert expected[3].finish_reason == "stop"


def test_a_loop_and_a_cache_that_grows(plain, engine, monkeypatch):
    monkeypatch.setattr("infer.engine.call.ROOM", 8)
    sampling = SamplingParams(temperature=0, loop_stop=2)
    expected = plain.complete([COPY], sampling)
    answers = engine.complete([COPY], sampling)
    assert answers == expected
    assert expected[0].finish_reason == "loop" and len(expected[0].output_ids) > 128
    assert ("grow", (1, 64, 256)) in engine.programs._programs
    assert answers[0].stats.passes < 100  # of 207 tokens


def test_up_to_the_last_slot(plain):
    """Drafts that exceed the cache, which has as many slots as the longest text."""
    short, speculating = (
        toy_engine(parrot(), share=plain, max_length=64, speculate=n) for n in (0, N)
    )
    for length in (20, 58, 62, 63):
        ids, sampling = (COPY * 5)[:length], SamplingParams(temperature=0)
        expected = short.complete([ids], sampling)
        assert speculating.complete([ids], sampling) == expected
        assert len(expected[0].output_ids) == 64 - length


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
    counts, accepted = dict.fromkeys(map(tuple, prefixes), 0), 0
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
    assert chi_square(exact**1.3 / np.sum(exact**1.3)) > 54.1  # the test sees a small error


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


def test_nothing_recompiles_once_warm():
    engine = toy_engine(parrot(), speculate=N)
    engine.complete([COPY], SamplingParams(max_new_tokens=20))
    assert engine.programs.compiled == 5  # prefill, pick, decode, verify, accept
    others = GREEDY, SamplingParams(repetition_penalty=1.3, logprobs=5), SamplingParams(seed=9)
    with compilations() as counted:
        for sampling, (ids, limit) in itertools.product(others, (([8], 20), (COPY[:5], 3))):
            limited = dataclasses.replace(sampling, max_new_tokens=limit)
            engine.complete([ids], limited)
            list(engine.run([ids], limited))
    assert engine.programs.compiled == 5 and not counted
    memory = engine.programs._programs["verify", (1, 64, N)].memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes(64)


def test_numbers_and_the_flag(capsys, monkeypatch):
    for bad in (-1, DRAFT + 1, 1.5, True, "4"):
        with pytest.raises(UsageError, match=f"speculate must be a whole number, 0 to {DRAFT}"):
            toy_engine(speculate=bad)
    for bad in ("-1", str(DRAFT + 1), "x"):
        with pytest.raises(SystemExit) as caught:
            generate_main([f"--speculate={bad}"])
        assert caught.value.code == 2 and "--speculate" in capsys.readouterr().err
    opened = []
    monkeypatch.setattr("infer.engine.load.open_choice", open_toy(opened))
    flags = ["-p", "x", "--max-new-tokens", "1", "--device", "cpu", "--compile-cache", "off"]
    assert generate_main([*flags, "--speculate", "3"]) == 0
    assert opened[0][1].speculate == 3
