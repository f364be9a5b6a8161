"""Sampling: checked parameters, hand-typed distributions, and transformers as the oracle."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from glm2_jax.errors import UsageError
from infer.engine import sampling
from infer.engine.params import PRESETS, SamplingParams

NINF = -math.inf


def rows(batch=1, **kwargs):
    params = SamplingParams(**{"temperature": 1, "top_k": 0, "top_p": 1} | kwargs)
    return sampling.Sampling.of([params] * batch, batch)


def filtered(scores, numbers, count=None):
    """The ranked scores back in the order of the vocabulary, -inf where dropped."""
    largest, ids = sampling.ranked(scores, count or scores.shape[-1])
    out = np.full(scores.shape, NINF, np.float32)
    np.put_along_axis(out, np.asarray(ids), sampling.filter_ranked(largest, numbers), axis=1)
    return out


def kept(probabilities, **kwargs):
    """Which of the tokens stay, and with which probability."""
    with np.errstate(divide="ignore"):
        scores = np.log(np.array([probabilities], np.float32))
    out = filtered(scores, rows(**kwargs))
    return np.asarray(jax.nn.softmax(out, axis=-1))[0]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.4, [0, 0, 0, 1]),
        (0.5, [0, 0, 0, 1]),  # the rest has exactly 1 - top_p: dropped
        (0.51, [0, 0, 0.375, 0.625]),
        (0.85, [0, 0.15789473, 0.31578946, 0.5263158]),
        (0.99, [0.05, 0.15, 0.3, 0.5]),
        (1.0, [0.05, 0.15, 0.3, 0.5]),
        (1e-9, [0, 0, 0, 1]),
    ],
)
def test_top_p_by_hand(top_p, expected):
    np.testing.assert_allclose(kept([0.05, 0.15, 0.3, 0.5], top_p=top_p), expected, atol=1e-6)


def test_top_p_tie_at_the_edge_drops_the_lower_id_first():
    np.testing.assert_allclose(kept([0.25] * 4, top_p=0.5), [0, 0, 0.5, 0.5])


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, [0, 0, 1, 0]),
        (2, [0.25, 0.25, 0.5, 0]),  # a tie with the second: both stay
        (3, [0.25, 0.25, 0.5, 0]),
        (4, [0.2, 0.2, 0.4, 0.2]),
        (0, [0.2, 0.2, 0.4, 0.2]),
        (99, [0.2, 0.2, 0.4, 0.2]),
    ],
)
def test_top_k_by_hand(top_k, expected):
    distribution = [0.25, 0.25, 0.5, 0] if top_k in (2, 3) else [0.2, 0.2, 0.4, 0.2]
    np.testing.assert_allclose(kept(distribution, top_k=top_k), expected, atol=1e-6)


def test_top_k_comes_before_top_p():
    # Of the two kept by top-k, 0.4 is 0.57 of what remains: enough for top-p 0.55.
    np.testing.assert_allclose(kept([0.1, 0.2, 0.3, 0.4], top_k=2, top_p=0.55), [0, 0, 0, 1])
    assert kept([0.1, 0.2, 0.3, 0.4], top_p=0.55)[2] > 0


def test_temperature_by_hand():
    np.testing.assert_allclose(kept([0.2, 0.8], temperature=0.5), [1 / 17, 16 / 17], atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-30, 1e-7, 1e30])
def test_extreme_temperatures_stay_finite(temperature):
    result = kept([0.2, 0.8], temperature=temperature)
    assert np.isfinite(result).all()
    assert result[1] == (1 if temperature < 1 else 0.5)


def test_penalty_by_hand():
    logits = np.array([[2.0, -2.0, 2.0, -2.0]], np.float32)
    seen = np.array([[True, True, False, False]])
    out = sampling.penalize(logits, seen, np.array([2.0], np.float32))
    assert out.tolist() == [[1.0, -4.0, 2.0, -2.0]]


@pytest.mark.parametrize("penalty", [2.0**-126, 3.4e38])
def test_extreme_penalties_leave_no_nan(penalty):
    logits = np.array([[9.0, -9.0, 0.0]], np.float32)
    for seen in ([[True] * 3], [[True, True, False]]):
        numbers = rows(1, temperature=1e-40, repetition_penalty=penalty)
        out = jax.jit(sampling.penalize)(logits, np.array(seen), numbers.repetition_penalty)
        assert np.isfinite(out).all()
        assert np.isfinite(jax.nn.softmax(filtered(out, numbers), axis=-1)).all()


@pytest.mark.parametrize("seed", range(2))
def test_filter_equals_transformers(seed):
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch (extra 'test')")
    processors = pytest.importorskip(
        "transformers.generation.logits_process", reason="the oracle is transformers"
    )
    rng = np.random.default_rng(seed)
    batch, vocab = 3, 211
    for temperature, top_k, top_p, penalty in [
        (0.8, 50, 0.8, 1.0),
        (0.95, 50, 0.7, 1.2),
        (1.7, 0, 0.9, 0.7),
        (0.3, 5, 0.999, 2.0),
        (1.0, 300, 0.05, 1.0),
    ]:
        logits = rng.normal(0, 3, (batch, vocab)).astype(np.float32)
        logits[:, 7] = logits[:, 9]  # a tie
        ids = rng.integers(0, vocab, (batch, 12))
        scores = torch.from_numpy(logits)
        chain = [
            processors.RepetitionPenaltyLogitsProcessor(penalty),
            processors.TemperatureLogitsWarper(temperature),
            processors.TopPLogitsWarper(top_p),
        ]
        if top_k:
            chain.insert(2, processors.TopKLogitsWarper(top_k))
        for processor in chain:
            scores = processor(torch.from_numpy(ids), scores)
        expected = torch.softmax(scores, -1).numpy()

        seen = np.zeros((batch, vocab), bool)
        np.put_along_axis(seen, ids, True, axis=1)
        numbers = rows(
            batch, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty
        )
        penalized = sampling.penalize(logits, seen, numbers.repetition_penalty)
        ours = filtered(penalized, numbers)
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(scores.numpy()))
        np.testing.assert_allclose(jax.nn.softmax(ours, -1), expected, atol=1e-6)


def test_the_largest_few_give_the_same_as_the_whole_vocabulary():
    rng = np.random.default_rng(0)
    # Steps of 1/16 make many ties, at the edges of top-k and top-p too.
    scores = (rng.normal(0, 3, (8, 1000)) * 16).round().astype(np.float32) / 16
    numbers = rows(8, top_k=20, top_p=0.7, temperature=1.5)
    few, whole = filtered(scores, numbers, sampling.FEW), filtered(scores, numbers)
    assert sampling.few_enough(sampling.ranked(scores, sampling.FEW)[0], numbers)
    np.testing.assert_array_equal(np.isfinite(few), np.isfinite(whole))
    np.testing.assert_allclose(few, whole)


@pytest.mark.parametrize(("top_k", "ties"), [(0, 1), (sampling.FEW, 1), (500, 1), (2, 200)])
def test_the_largest_few_are_not_enough(top_k, ties):
    scores = np.arange(1000, dtype=np.float32)[None]
    scores[:, -ties:] = 1000
    few = sampling.ranked(scores, sampling.FEW)[0]
    assert not sampling.few_enough(few, rows(top_k=top_k))


def test_a_draw_does_not_depend_on_what_was_skipped(monkeypatch):
    logits = np.random.default_rng(1).normal(0, 2, (4, 1000)).astype(np.float32)
    seen = np.zeros((4, 1000), bool)
    numbers = rows(4, top_k=50, top_p=0.8)

    def draws():
        draw = jax.jit(lambda *args: sampling.sample(*args))  # traced each time
        return [draw(logits, keys(4, step), seen, numbers).tolist() for step in range(5)]

    few = draws()
    monkeypatch.setattr(sampling, "few_enough", lambda *_: np.array(False))
    assert draws() == few


def keys(batch, step=0, seed=0):
    seeds = np.tile(sampling.seed_words(seed), (batch, 1))
    return sampling.row_keys(seeds, np.arange(batch, dtype=np.int32), np.int32(step))


def test_greedy_takes_the_lowest_id_among_equals_and_obeys_the_penalty():
    logits = np.array([[0, 3, 3, 1], [0, 3, 2, 1]], np.float32)
    seen = np.array([[False] * 4, [False, True, False, False]])
    numbers = rows(2, temperature=0, repetition_penalty=2.0)
    assert sampling.sample(logits, keys(2), seen, numbers).tolist() == [1, 2]


def test_rows_may_differ_and_greedy_rows_stay_greedy():
    logits = np.tile(np.array([0, 0, 0, 0.5], np.float32), (2, 1))
    numbers = rows(2)._replace(temperature=np.array([0, 5], np.float32))
    seen = np.zeros((2, 4), bool)
    draw = jax.jit(sampling.sample)
    drawn = np.array([draw(logits, keys(2, step), seen, numbers) for step in range(40)])
    assert (drawn[:, 0] == 3).all()
    assert set(drawn[:, 1]) == {0, 1, 2, 3}


def test_frequencies_follow_the_filtered_distribution():
    count = 4000
    logits = np.tile(np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32)), (count, 1))
    drawn = sampling.sample(logits, keys(count), np.zeros((count, 4), bool), rows(count, top_k=3))
    share = np.bincount(np.asarray(drawn), minlength=4) / count
    np.testing.assert_allclose(share, [0, 2 / 9, 3 / 9, 4 / 9], atol=0.03)


def test_keys_depend_on_seed_row_and_step_only():
    seeds = np.array([sampling.seed_words(seed) for seed in (9, 8, 7, 5, 4)])
    alone = sampling.row_keys(seeds[3:4], np.array([3], np.int32), 7)
    batch = sampling.row_keys(seeds, np.arange(5, dtype=np.int32), 7)
    assert jax.random.key_data(alone[0]).tolist() == jax.random.key_data(batch[3]).tolist()
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 3), 7)
    assert jax.random.key_data(alone[0]).tolist() == jax.random.key_data(expected).tolist()
    large = jax.random.key_data(keys(1, seed=2**40))
    assert large.tolist() != jax.random.key_data(keys(1, seed=0)).tolist()


def test_one_program_for_every_setting():
    traces = []

    @jax.jit
    def draw(*args):
        traces.append(1)
        return sampling.sample(*args)

    logits, seen = np.zeros((2, 8), np.float32), np.zeros((2, 8), bool)
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.1)):
        draw(logits, keys(2), seen, sampling.Sampling.of([params], 2))
    assert len(traces) == 1


def test_logprobs_are_of_the_raw_logits():
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)) + 3
    result = sampling.token_logprobs(logits, np.array([1], np.int32), np.array([True]))
    np.testing.assert_allclose(np.exp(result.chosen), [0.2], rtol=1e-5)
    np.testing.assert_allclose(np.exp(result.top), [[0.4, 0.3, 0.2, 0.1]], rtol=1e-5)
    assert result.top_ids.tolist() == [[3, 2, 1, 0]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e39),
        ("temperature", "0.8"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 2.0),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-40),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("seed", 2**63),
        pytest.param("seed", 10**5000, id="too long to write"),
        ("logprobs", 21),
        ("loop_stop", 1),
        ("stop", ""),
        ("stop", ("a", "")),
        ("stop", 5),
    ],
)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(UsageError, match=name) as error:
        SamplingParams(**{name: value})
    assert error.value.exit_code == 2


def test_from_kwargs():
    assert SamplingParams.from_kwargs() == PRESETS["official"]
    assert SamplingParams.from_kwargs(preset="api", stop="a").stop == ("a",)
    assert SamplingParams.from_kwargs(preset="api").temperature == 0.95
    assert SamplingParams.from_kwargs(do_sample=False, num_beams=1).temperature == 0
    assert SamplingParams.from_kwargs(top_k=np.int32(3)).top_k == 3
    for bad, words in [
        ({"num_beams": 4}, "num_beams"),
        ({"topp": 0.5}, r"topp(.|\n)*top_p"),
        ({"preset": "web"}, r"web(.|\n)*official"),
        ({"do_sample": 1}, "do_sample"),
    ]:
        with pytest.raises(UsageError, match=words):
            SamplingParams.from_kwargs(**bad)


def test_presets_are_the_published_defaults():
    official, api = PRESETS["official"], PRESETS["api"]
    assert dataclasses.replace(official, max_length=None) == SamplingParams()
    assert (official.temperature, official.top_p, official.top_k, official.max_length) == (
        0.8,
        0.8,
        50,
        8192,
    )
    assert (api.temperature, api.top_p, api.top_k, api.max_length) == (0.95, 0.7, 50, 2048)
