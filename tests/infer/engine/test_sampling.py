"""Sampling: checked parameters, hand-typed distributions, and transformers as the oracle."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
import scipy.stats

from glm2_jax.errors import UsageError
from infer.engine import sampling
from infer.engine.params import MAX_LOGPROBS, PRESETS, SamplingParams
from infer.engine.steps import Controls, State, pick

RISING, SECOND_TWICE = [0.0625, 0.1875, 0.25, 0.5], [0.25, 0.25, 0.5, 0]

WEIGHTS = jax.jit(sampling.filtered_weights)


def rows(batch=1, **kwargs):
    params = SamplingParams(**{"temperature": 1, "top_k": 0, "top_p": 1} | kwargs)
    return sampling.Sampling.of([params] * batch)


def keys(batch, step=0, seed=0):
    seeds = np.tile(sampling.seed_words(seed), (batch, 1))
    return sampling.row_keys(seeds, np.arange(batch, dtype=np.int32), np.int32(step))


def filtered(scores, numbers):
    """The distribution that is drawn from, [B, V]; exactly 0 where a token is dropped."""
    scores = np.asarray(scores)
    weights = WEIGHTS(scores - scores.max(axis=1, keepdims=True), numbers)
    weights = np.asarray(weights).reshape(len(scores), -1)
    assert not weights[:, scores.shape[1] :].any()  # what fills up the last block
    return weights[:, : scores.shape[1]] / weights.sum(axis=1, keepdims=True)


def by_sorting(scores, temperature, top_k, top_p):
    """The oracle of `filtered` in NumPy, and by how much each row's top-p threshold is met."""
    weights = np.exp((scores - scores.max(axis=1, keepdims=True)) / np.float32(temperature))
    weights, margins = weights.astype(np.float64), []
    for row in weights:
        order = np.argsort(row, kind="stable")
        if top_k:
            row[row < row[order[-min(top_k, len(row))]]] = 0
        below = np.cumsum(row[order]) / row.sum()
        if top_p < 1:
            row[order[:-1][below[:-1] <= 1 - top_p]] = 0
        margins.append(np.abs(below - (1 - top_p)).min() if top_p < 1 else 1)
    return weights / weights.sum(axis=1, keepdims=True), np.array(margins)


def kept(probabilities, **kwargs):
    """Which of the tokens stay, and with which probability."""
    with np.errstate(divide="ignore"):
        scores = np.log(np.array([probabilities], np.float32))
    return filtered(scores, rows(**kwargs))[0]


@pytest.mark.parametrize(
    ("probabilities", "params", "expected"),
    [
        (RISING, {"top_p": 1e-9}, [0, 0, 0, 1]),
        (RISING, {"top_p": 0.5}, [0, 0, 0, 1]),  # the rest has exactly 1 - top_p: dropped
        (RISING, {"top_p": 1.0}, RISING),
        ([0.25] * 4, {"top_p": 0.5}, [0, 0, 0.5, 0.5]),  # of equals the lower id goes first
        (SECOND_TWICE, {"top_k": 2}, SECOND_TWICE),  # a tie with the second: both stay
        (RISING, {"top_k": 99}, RISING),
        # Of the two kept by top-k, the larger is 0.57 of what remains: enough for top-p 0.55.
        ([0.1, 0.2, 0.3, 0.4], {"top_k": 2, "top_p": 0.55}, [0, 0, 0, 1]),
        ([0.2, 0.8], {"temperature": 0.5}, [1 / 17, 16 / 17]),
        ([0.2, 0.8], {"temperature": 1e-30}, [0, 1]),
        ([0.2, 0.8], {"temperature": 1e30}, [0.5, 0.5]),
    ],
)
def test_filters_by_hand(probabilities, params, expected):
    np.testing.assert_allclose(kept(probabilities, **params), expected, atol=1e-6)


@pytest.mark.parametrize("vocab", [8, 211, 640])
def test_thresholds_are_exact(vocab):
    rng, batch, close = np.random.default_rng(0), 64, 0
    for temperature, top_k, top_p in [
        (1, 0, 0.9), (1, 1, 1), (0.7, 5, 1), (1.7, vocab - 1, 1), (0.3, 5, 0.999), (1.0, 300, 0.05),
        (2, 0, 0.2), (0.8, 50, 0.8), (5, 3, 0.5),
    ]:  # fmt: skip
        scores = rng.normal(0, 3, (batch, vocab)).astype(np.float32)
        scores[::2] = np.round(scores[::2])  # ties everywhere, at the edges too
        scores[5, 1:] = -np.inf
        scores[7] = 1.5
        numbers = rows(batch, temperature=temperature, top_k=top_k, top_p=top_p)
        found = filtered(scores, numbers)
        expected, margins = by_sorting(scores, temperature, top_k, top_p)
        clear = margins > 1e-6  # closer than that, rounding decides
        close += np.count_nonzero(~clear)
        np.testing.assert_array_equal(found[clear] > 0, expected[clear] > 0)
        np.testing.assert_allclose(found[clear], expected[clear], atol=1e-6)
    assert close < 40


def test_filter_equals_transformers():
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch (extra 'test')")
    processors = pytest.importorskip(
        "transformers.generation.logits_process", reason="the oracle is transformers"
    )
    rng, batch, vocab = np.random.default_rng(0), 32, 211
    for temperature, top_k, top_p, penalty in [
        (0.8, 50, 0.8, 1.0), (1.7, 0, 0.9, 0.7), (0.3, 5, 0.999, 2.0), (1.0, 300, 0.05, 1.0),
    ]:  # fmt: skip
        logits = rng.normal(0, 3, (batch, vocab)).astype(np.float32)
        logits[:, 7] = logits[:, 9]  # a tie
        ids = rng.integers(0, vocab, (batch, 12))
        scores = torch.from_numpy(logits)
        chain = [
            processors.RepetitionPenaltyLogitsProcessor(penalty),
            processors.TemperatureLogitsWarper(temperature),
            *([processors.TopKLogitsWarper(top_k)] if top_k else []),
            processors.TopPLogitsWarper(top_p),
        ]
        for processor in chain:
            scores = processor(torch.from_numpy(ids), scores)
        numbers = rows(
            batch, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty
        )
        counts = sampling.prompt_counts(ids.tolist(), batch, vocab)
        ours = filtered(sampling.adjust(logits, counts, numbers), numbers)
        np.testing.assert_array_equal(ours > 0, np.isfinite(scores.numpy()))
        np.testing.assert_allclose(ours, torch.softmax(scores, -1).numpy(), atol=1e-6)


def test_frequencies_follow_the_filtered_distribution():
    vocab, count = 48, 200_000
    logits = np.random.default_rng(2).normal(0, 1.5, vocab).astype(np.float32)
    logits[3] = logits[5]
    draw = jax.jit(sampling.sample)
    many = np.broadcast_to(logits, (count, vocab)), np.zeros((count, vocab), np.int16)

    def surprise(drawn, expected):
        seen = np.bincount(drawn, minlength=vocab)
        if seen[expected == 0].any():
            return 0.0
        return scipy.stats.chisquare(seen[expected > 0], expected[expected > 0] * count).pvalue

    # Each setting, and others that are near and must not pass for it.
    settings = {
        (0.7, 0, 1): [(0.72, 0, 1), (0.7, 47, 1)],
        (1, 9, 1): [(1, 8, 1), (1, 10, 1)],
        (1, 0, 0.8): [(1, 0, 0.76), (1, 0, 0.84)],
        (1.3, 30, 0.9): [(1.37, 30, 0.9), (1.3, 0, 0.9)],
    }
    for step, (setting, near) in enumerate(settings.items()):
        names = "temperature", "top_k", "top_p"
        drawn = draw(
            many[0],
            keys(count, step),
            many[1],
            rows(count, **dict(zip(names, setting, strict=True))),
        )
        right, *wrong = (
            surprise(drawn, by_sorting(logits[None], *one)[0][0]) for one in (setting, *near)
        )
        assert right > 1e-3 and max(wrong) < 1e-6, (setting, right, wrong)


@pytest.mark.parametrize("size", [8, 4096])
def test_the_ends_of_the_random_numbers_choose_tokens_that_have_a_weight(size):
    weights = np.random.default_rng(3).random((4, size)).astype(np.float32)
    weights[:, : size // 4] = weights[:, -size // 4 :] = weights[:, 3::5] = 0
    weights[1] *= 1e-30
    weights[2] = 0
    weights[2, size // 2] = 1
    have = [np.flatnonzero(row) for row in weights]
    blocks, one = weights.reshape(4, -1, 4 if size == 8 else 64), np.ones(4, np.float32)
    assert sampling.locate(blocks, 0 * one).tolist() == [row[0] for row in have]
    for last in (np.float32(1 - 2**-24), 1.0):
        assert sampling.locate(blocks, last * one).tolist() == [row[-1] for row in have]
    for share in np.linspace(0, 1, 50, dtype=np.float32):
        found = np.asarray(sampling.locate(blocks, share * one))
        assert all(token in row for token, row in zip(found.tolist(), have, strict=True))
        ends = np.cumsum(weights, axis=1, dtype=np.float64)[np.arange(4), found]
        total = weights.sum(axis=1, dtype=np.float64)
        before = ends - weights[np.arange(4), found]
        assert (before <= (share + 1e-6) * total).all() and (ends >= (share - 1e-6) * total).all()


def test_rows_of_a_batch_do_not_depend_on_each_other():
    vocab = 1000
    params = [
        SamplingParams(temperature=0),
        SamplingParams(1, 0, 1),
        SamplingParams(1, 0, 0.9),
        SamplingParams(0.8, 50, 0.8),
        SamplingParams(1, 7, 1, presence_penalty=1, logit_bias={5: 4}),
        SamplingParams(1e-30, 0, 1),
        SamplingParams(2, vocab + 5, 1, repetition_penalty=1.3),
    ]
    count = len(params)
    logits = np.random.default_rng(1).normal(0, 2, (count, vocab)).astype(np.float32)
    logits[:, 100:400] = -np.inf
    counts = np.random.default_rng(2).integers(0, 4, (count, vocab)).astype(np.int16)
    draw, everything = jax.jit(sampling.sample), np.full((count, 32), sampling.EVERY)
    narrow = everything.copy()
    narrow[0, :], narrow[2, 1:] = 2**30, 0  # greedy: any of 32; top-p: the first 32
    for step in range(8):
        random, numbers = keys(count, step), sampling.Sampling.of(params)
        together = draw(logits, random, counts, numbers)
        assert draw(logits, random, counts, numbers, everything).tolist() == together.tolist()
        masked = draw(logits, random, counts, numbers, narrow)
        assert masked[0] % 32 == 30 and masked[2] < 32
        for row, one in enumerate(params):
            part = slice(row, row + 1)
            alone = sampling.Sampling.of([one])
            assert draw(logits[part], random[part], counts[part], alone)[0] == together[row]
            assert row in (0, 2) or masked[row] == together[row]
        assert together[5] == logits[5].argmax() and np.isfinite(logits[0][together]).all()


def test_a_large_vocabulary_and_equal_tokens():
    logits, counts = np.zeros((4, 65_024), np.float32), np.zeros((4, 65_024), np.int16)
    params = [SamplingParams(0), *(SamplingParams(1, 0, p) for p in (1, 0.5)), SamplingParams(1, 9)]
    draw, numbers = jax.jit(sampling.sample), sampling.Sampling.of(params)
    drawn = np.array([draw(logits, keys(4, step), counts, numbers) for step in range(6)])
    assert (drawn[:, 0] == 0).all() and len(set(drawn[:, 1])) == len(set(drawn[:, 3])) == 6
    assert (drawn[:, 2] >= 32_512).all()  # of equals the lower half goes first
    np.testing.assert_array_equal((filtered(logits, numbers) > 0).sum(axis=1)[1:3], [65024, 32512])


def test_penalties_by_their_formula():
    rng, batch, vocab = np.random.default_rng(4), 5, 60
    logits = rng.normal(0, 5, (batch, vocab)).astype(np.float32)
    prompts, answers = rng.integers(0, vocab, (2, batch, 20))
    counts = sampling.prompt_counts(prompts.tolist(), batch, vocab)
    counts = sampling.counted(counts, answers[:, :12], np.ones((batch, 12), bool))
    counts = sampling.counted(counts, answers[:, 12:], np.zeros((batch, 8), bool))
    asked = [(1, 0, 0), (1.5, 0, 0), (1, 1.5, 0), (1, 0, -0.7), (0.8, -2, 2)]
    biases = {3: 1.5, 59: -100.0, 0: 2.25}
    params = [
        SamplingParams(
            repetition_penalty=one[0], presence_penalty=one[1], frequency_penalty=one[2],
            logit_bias=biases if row % 2 else {},
        )
        for row, one in enumerate(asked)
    ]  # fmt: skip
    found = sampling.adjust(logits, counts, sampling.Sampling.of(params))
    for row, (repetition, presence, frequency) in enumerate(asked):
        times = np.bincount(answers[row, :12], minlength=vocab)
        scores = logits[row].copy()
        for token in biases if row % 2 else ():
            scores[token] += biases[token]
        for token in {*prompts[row].tolist(), *answers[row, :12].tolist()}:
            scores[token] *= repetition if scores[token] < 0 else 1 / repetition
        scores -= presence * (times > 0) + frequency * times
        np.testing.assert_allclose(found[row], scores, rtol=1e-6, atol=1e-5)
    assert (times > 1).any() and found[0].tolist() == logits[0].tolist()


def test_penalties_and_counts_at_their_limits():
    logits, counts = (
        np.array([[10.0, -10.0, 10.0, -10.0]], np.float32),
        np.full((1, 4), 1, np.int16),
    )
    for penalty in (2.0**-126, 3.4e38):
        numbers = rows(1, temperature=1e-40, repetition_penalty=penalty)
        out = jax.jit(sampling.adjust)(logits, counts, numbers)
        assert np.isfinite(out).all() and np.isfinite(filtered(out, numbers)).all()
    full = np.array([[32_000, 31_998, 32_001, 1]], np.int16)
    for _ in range(4):
        full = sampling.counted(full, np.array([[0, 1, 2, 3]]), np.ones((1, 4), bool))
    assert full.tolist() == [[32_000, 32_000, 32_001, 9]]
    out = sampling.adjust(0 * logits, full, rows(frequency_penalty=1))
    assert out.tolist() == [[-16_000, -16_000, -16_000, -4]]


def test_greedy_takes_the_lowest_id_among_equals_and_what_is_allowed():
    logits = np.tile(np.array([0, 3, 3, 1] * 10, np.float32), (3, 1))
    counts = np.zeros((3, 40), np.int16)
    counts[1, 1] = 1
    numbers = rows(3, temperature=0, repetition_penalty=2.0)
    assert sampling.sample(logits, keys(3), counts, numbers).tolist() == [1, 2, 1]
    allowed = np.array([[2**3, 0], [2**32 - 1, 0], [1, 2**5 + 2**6]], np.uint32)
    for temperature, likely in ((0, [3, 2, 37]), (1e-9, [3, None, None])):
        numbers = rows(3, temperature=temperature, repetition_penalty=2.0)
        drawn = sampling.sample(logits, keys(3), counts, numbers, allowed).tolist()
        assert all(want in (None, token) for token, want in zip(drawn, likely, strict=True))
        assert drawn[1] < 32 and drawn[2] in (0, 37, 38)


def test_nothing_is_sorted():
    batch, vocab = 4, 2000
    flags, ints = np.ones(batch, bool), np.ones(batch, np.int32)
    controls = Controls(
        rows(batch), np.zeros((batch, 2), np.uint32), ints, ints, ints[:, None], flags
    )
    state = State(None, ints, np.zeros((batch, vocab), np.int16), flags, ints)
    logits = np.zeros((batch, vocab), np.float32)
    text = jax.jit(pick).lower(logits, controls, flags, state).compile().as_text()
    assert "conditional" in text and not re.search(r"\bsort|top-?k", text, re.IGNORECASE)


def test_keys_depend_on_seed_row_and_step_only():
    seeds = np.array([sampling.seed_words(seed) for seed in (9, 8, 7, 5, 4)])
    alone = sampling.row_keys(seeds[3:4], np.array([3], np.int32), 7)
    batch = sampling.row_keys(seeds, np.arange(5, dtype=np.int32), 7)
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 3), 7)
    for one in (alone[0], batch[3]):
        assert jax.random.key_data(one).tolist() == jax.random.key_data(expected).tolist()
    large = jax.random.key_data(keys(1, seed=2**40))
    assert large.tolist() != jax.random.key_data(keys(1, seed=0)).tolist()


def test_logprobs_are_of_the_raw_logits():
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)) + 3
    result = sampling.token_logprobs(logits, np.array([1], np.int32), np.array([True]))
    np.testing.assert_allclose(np.exp(result.chosen), [0.2], rtol=1e-5)
    np.testing.assert_allclose(np.exp(result.top), [[0.4, 0.3, 0.2, 0.1]], rtol=1e-5)
    assert result.top_ids.tolist() == [[3, 2, 1, 0]]


def test_logprobs_of_a_prompt():
    logits = np.random.default_rng(5).normal(0, 2, (2, 3, 300)).astype(np.float32)
    logits[0, 0, [7, 250, 9]] = 20  # equals: the lower id first
    tokens = np.array([[0, 7, 299], [4, 5, 6]], np.int32)
    found = sampling.prompt_logprobs(logits, tokens)
    assert found.top.shape == found.top_ids.shape == (2, 3, MAX_LOGPROBS)
    expected = jax.nn.log_softmax(logits, axis=-1)
    chosen = np.take_along_axis(np.asarray(expected), tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.chosen, chosen, atol=1e-5)
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :MAX_LOGPROBS]
    assert found.top_ids.tolist() == order.tolist() and order[0, 0, :3].tolist() == [7, 9, 250]
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, axis=-1), atol=1e-5)


BAD = {
    "temperature": (-0.1, math.nan, math.inf, 1e39, "0.8", None),
    "top_p": (0, 1.01),
    "top_k": (-1, 2.0),
    "repetition_penalty": (0, 1e-40),
    "presence_penalty": (-2.01, math.nan, None),
    "frequency_penalty": (2.01, "1"),
    "logit_bias": (
        {-1: 0},
        {"5": 1},
        {5: 101},
        {5: math.nan},
        dict.fromkeys(range(301), 1),
        5,
        "5=1",
        [(5, 1), (5, 2)],
        None,
    ),
    "stop_token_ids": (-1, "a", range(17), [2.5], None),
    "ignore_eos": (1, None),
    "max_new_tokens": (0,),
    "max_length": (0,),
    "seed": (-1, 2**63, 10**5000),
    "logprobs": (21,),
    "loop_stop": (1,),
    "stop": ("", ("a", ""), 5),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(name):
    for value in BAD[name]:
        with pytest.raises(UsageError, match=name) as error:
            SamplingParams(**{name: value})
        assert error.value.exit_code == 2


def test_from_kwargs_and_presets():
    make, api = SamplingParams.from_kwargs, PRESETS["api"]
    assert make() == PRESETS["official"] == SamplingParams(0.8, 50, 0.8, max_length=8192)
    assert (api.temperature, api.top_p, api.top_k, api.max_length) == (0.95, 0.7, 50, 2048)
    assert make(preset="api", stop="a").stop == ("a",)
    assert make(do_sample=False, num_beams=1).temperature == 0
    assert make(top_k=np.int32(3)).top_k == 3
    biased = make(logit_bias={7: 1, np.int32(3): -2.5}, stop_token_ids=[4, 5, 4])
    assert biased.logit_bias == ((3, -2.5), (7, 1.0)) and biased.stop_token_ids == (4, 5)
    assert hash(biased) == hash(SamplingParams.from_kwargs(**dataclasses.asdict(biased)))
    for bad, words in [
        ({"num_beams": 4}, "num_beams"),
        ({"topp": 0.5}, r"topp(.|\n)*Did you mean top_p"),
        ({"preset": "web"}, r"web(.|\n)*official"),
        ({"do_sample": 1}, "do_sample"),
    ]:
        with pytest.raises(UsageError, match=words):
            make(**bad)
