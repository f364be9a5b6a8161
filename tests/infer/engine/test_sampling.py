"""Sampling: checked parameters, hand-typed distributions, and transformers as the oracle."""

import math

import jax
import numpy as np
import pytest

from glm2_jax.errors import UsageError
from infer.engine import sampling
from infer.engine.params import PRESETS, SamplingParams

RISING, SECOND_TWICE = [0.05, 0.15, 0.3, 0.5], [0.25, 0.25, 0.5, 0]


def rows(batch=1, **kwargs):
    params = SamplingParams(**{"temperature": 1, "top_k": 0, "top_p": 1} | kwargs)
    return sampling.Sampling.of([params] * batch)


def keys(batch, step=0, seed=0):
    seeds = np.tile(sampling.seed_words(seed), (batch, 1))
    return sampling.row_keys(seeds, np.arange(batch, dtype=np.int32), np.int32(step))


def filtered(scores, numbers, count=None):
    """The ranked scores back in the order of the vocabulary, -inf where dropped."""
    largest, ids = sampling.ranked(scores, count or scores.shape[-1])
    out = np.full(scores.shape, -math.inf, np.float32)
    np.put_along_axis(out, np.asarray(ids), sampling.filter_ranked(largest, numbers), axis=1)
    return out


def kept(probabilities, **kwargs):
    """Which of the tokens stay, and with which probability."""
    with np.errstate(divide="ignore"):
        scores = np.log(np.array([probabilities], np.float32))
    return np.asarray(jax.nn.softmax(filtered(scores, rows(**kwargs)), axis=-1))[0]


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


def test_penalty_by_hand_and_at_its_limits():
    logits = np.array([[2.0, -2.0, 2.0, -2.0]], np.float32)
    seen = np.array([[True, True, False, False]])
    out = sampling.penalize(logits, seen, np.array([2.0], np.float32))
    assert out.tolist() == [[1.0, -4.0, 2.0, -2.0]]
    for penalty in (2.0**-126, 3.4e38):
        numbers = rows(1, temperature=1e-40, repetition_penalty=penalty)
        out = jax.jit(sampling.penalize)(logits * 5, seen, numbers.repetition_penalty)
        assert np.isfinite(out).all()
        assert np.isfinite(jax.nn.softmax(filtered(out, numbers), axis=-1)).all()


def test_filter_equals_transformers():
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch (extra 'test')")
    processors = pytest.importorskip(
        "transformers.generation.logits_process", reason="the oracle is transformers"
    )
    rng, batch, vocab = np.random.default_rng(0), 3, 211
    for temperature, top_k, top_p, penalty in [
        (0.8, 50, 0.8, 1.0),
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
            *([processors.TopKLogitsWarper(top_k)] if top_k else []),
            processors.TopPLogitsWarper(top_p),
        ]
        for processor in chain:
            scores = processor(torch.from_numpy(ids), scores)
        seen = np.zeros((batch, vocab), bool)
        np.put_along_axis(seen, ids, True, axis=1)
        numbers = rows(
            batch, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty
        )
        ours = filtered(sampling.penalize(logits, seen, numbers.repetition_penalty), numbers)
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(scores.numpy()))
        expected = torch.softmax(scores, -1).numpy()
        np.testing.assert_allclose(jax.nn.softmax(ours, -1), expected, atol=1e-6)


def test_the_largest_few_are_enough_or_known_not_to_be():
    rng = np.random.default_rng(0)
    # Steps of 1/16 make many ties, at the edges of top-k and top-p too.
    scores = (rng.normal(0, 3, (8, 1000)) * 16).round().astype(np.float32) / 16
    numbers = rows(8, top_k=20, top_p=0.7, temperature=1.5)
    few, whole = filtered(scores, numbers, sampling.FEW), filtered(scores, numbers)
    assert sampling.few_enough(sampling.ranked(scores, sampling.FEW)[0], numbers)
    np.testing.assert_array_equal(np.isfinite(few), np.isfinite(whole))
    np.testing.assert_allclose(few, whole)
    for top_k, ties in ((0, 1), (sampling.FEW, 1), (500, 1), (2, 200)):
        scores = np.arange(1000, dtype=np.float32)[None]
        scores[:, -ties:] = 1000
        few = sampling.ranked(scores, sampling.FEW)[0]
        assert not sampling.few_enough(few, rows(top_k=top_k))


def test_a_draw_does_not_depend_on_what_was_skipped(monkeypatch):
    logits = np.random.default_rng(1).normal(0, 2, (4, 1000)).astype(np.float32)
    seen, numbers = np.zeros((4, 1000), bool), rows(4, top_k=50, top_p=0.8)

    def draws():
        draw = jax.jit(lambda *args: sampling.sample(*args))  # traced each time
        return [draw(logits, keys(4, step), seen, numbers).tolist() for step in range(5)]

    few = draws()
    monkeypatch.setattr(sampling, "few_enough", lambda *_: np.array(False))
    assert draws() == few


def test_greedy_takes_the_lowest_id_among_equals_and_obeys_the_penalty():
    logits = np.array([[0, 3, 3, 1], [0, 3, 2, 1]], np.float32)
    seen = np.array([[False] * 4, [False, True, False, False]])
    numbers = rows(2, temperature=0, repetition_penalty=2.0)
    assert sampling.sample(logits, keys(2), seen, numbers).tolist() == [1, 2]


def test_frequencies_follow_the_filtered_distribution_and_greedy_rows_stay_greedy():
    count = 4000
    logits = np.tile(np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32)), (count, 1))
    numbers = rows(count, top_k=3)
    numbers.temperature[count // 2 :] = 0
    drawn = np.asarray(sampling.sample(logits, keys(count), np.zeros((count, 4), bool), numbers))
    share = np.bincount(drawn[: count // 2], minlength=4) / (count // 2)
    np.testing.assert_allclose(share, [0, 2 / 9, 3 / 9, 4 / 9], atol=0.04)
    assert (drawn[count // 2 :] == 3).all()


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


BAD = {
    "temperature": (-0.1, math.nan, math.inf, 1e39, "0.8", None),
    "top_p": (0, 1.01),
    "top_k": (-1, 2.0),
    "repetition_penalty": (0, 1e-40),
    "max_new_tokens": (0,),
    "max_length": (0,),
    "seed": (-1, 2**63, 10**5000),
    "logprobs": (21,),
    "loop_stop": (1,),
    "stop": ("", ("a", ""), 5),
}


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
    for bad, words in [
        ({"num_beams": 4}, "num_beams"),
        ({"topp": 0.5}, r"topp(.|\n)*Did you mean top_p"),
        ({"preset": "web"}, r"web(.|\n)*official"),
        ({"do_sample": 1}, "do_sample"),
    ]:
        with pytest.raises(UsageError, match=words):
            make(**bad)
