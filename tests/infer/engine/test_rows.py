"""Rows, the batch of arrays that they make, and their statistics, without a model; and arguments of
the Python interface that are almost right, or not at all."""

from functools import partial

import numpy as np
import pytest

import infer
from glm2_jax import Tokenizer
from glm2_jax.errors import CheckpointError, InputError, UsageError
from infer.engine.answer import Answer
from infer.engine.call import Batch
from infer.engine.params import SamplingParams
from infer.engine.rows import make_rows
from infer.engine.sampling import Logprobs
from infer.engine.stats import Stats, add_stats, together
from infer.engine.steps import IDLE, NOT_FINITE, Output
from tests.support.engine_toy import toy_engine, warm_engine
from tests.support.sp_model import sp_model

END = 639
ANSWER = partial(Answer, Tokenizer.from_bytes(sp_model(), "chatglm2"), stop_ids=(END,), clean=False)
SHORT = {"temperature": 0, "max_new_tokens": 2}


def batch_of(prompts, sampling, row_ids=None, **kwargs):
    sizes = {"vocab_size": 640, "max_length": 256}
    rows = make_rows(prompts, sampling, row_ids, ANSWER, **sizes)
    return Batch(rows, **sizes, **({"chunk": 512} | kwargs))


def output(*tokens, logprobs=None):
    return Output(np.array(tokens, np.int32), logprobs)


def test_every_row_has_its_own_parameters_in_the_arrays():
    one = SamplingParams(temperature=0.5, top_k=3, seed=2**40 + 7, max_new_tokens=4)
    two = SamplingParams(
        top_p=0.5, repetition_penalty=1.5, presence_penalty=1, frequency_penalty=2, logprobs=2,
        logit_bias={9: 2, 3: -1}, max_length=100, ignore_eos=True, stop_token_ids=(7, 8),
    )  # fmt: skip
    three = SamplingParams(stop_token_ids=(9, END))
    batch = batch_of([[5, 6], [7] * 10, [8]], [one, two, three], [4, 0, 9])
    controls = batch.controls
    assert batch.size == 4 and controls.seed.tolist() == [[2**8, 7], [0, 0], [0, 0], [0, 0]]
    assert controls.row_ids.tolist() == [4, 0, 9, 0]
    assert controls.limit.tolist() == [4, 90, 255, 0]
    assert controls.want_logprobs.tolist() == [False, True, False, False]
    assert controls.sampling.top_k.tolist() == [3, 50, 50, 50]
    np.testing.assert_allclose(controls.sampling.temperature, [0.5, 0.8, 0.8, 0])
    np.testing.assert_allclose(controls.sampling.repetition_penalty, [1, 1.5, 1, 1])
    assert np.flatnonzero(batch.counts[0] == 1).tolist() == [5, 6]
    assert controls.sampling.bias_ids[:, :3].tolist() == [[-1] * 3, [3, 9, -1], *[[-1] * 3] * 2]
    assert controls.sampling.bias[1, :3].tolist() == [-1, 2, 0]
    assert (controls.sampling.presence_penalty[1], controls.sampling.frequency_penalty[1]) == (1, 2)
    ends = [[END, -1, -1], [7, 8, -1], [END, 9, -1], [-1] * 3]
    assert controls.stop_ids[:, :3].tolist() == ends and (controls.stop_ids[:, 3:] == -1).all()
    assert batch.keep.tolist() == [True, True, True, False]


def test_rows_take_their_tokens_and_end_one_by_one():
    batch = batch_of([[5, 6], [7]], SamplingParams(max_new_tokens=3))
    assert [event.token for event in batch.take(output(30, 31))] == [30, 31]
    ended, going = batch.take(output(END, 32))
    assert (ended.row, ended.token, ended.finish_reason) == (0, None, "stop")
    assert ended.completion.output_ids == (30,) and ended.completion.stop_reason == END
    assert (going.token, going.completion) == (32, None)
    assert batch.keep.tolist() == [False, True]
    assert (batch.drawn, batch.steps_wanted, batch.slots(2)) == (2, 3, 3)
    (last,) = batch.take(output(IDLE, 33))
    assert last.finish_reason == "length" and last.completion.output_ids == (31, 32, 33)
    assert not batch.going and not batch.take(output(9, 9))
    assert (batch.drawn, batch.steps_wanted, batch.slots(9)) == (0, 0, 0)


def test_only_rows_that_asked_get_log_probabilities():
    params = [SamplingParams(), SamplingParams(logprobs=0), SamplingParams(logprobs=2)]
    batch = batch_of([[5], [6], [7]], params)
    chosen, top = np.arange(4.0), np.arange(80.0).reshape(4, 20)
    ids = np.arange(80).reshape(4, 20)
    events = batch.take(output(30, 31, 32, IDLE, logprobs=Logprobs(chosen, top, ids)))
    assert events[0].logprob is None and events[1].logprob.top == ()
    assert (events[2].logprob.token, events[2].logprob.logprob) == (32, 2)
    assert events[2].logprob.top == ((40, 40.0), (41, 41.0))


def test_nan_names_prompt_and_step():
    batch = batch_of([[5], [6]], SamplingParams())
    batch.take(output(30, 31))
    with pytest.raises(CheckpointError, match="NaN or Inf at step 2 of the answer to prompt 2"):
        batch.take(output(30, NOT_FINITE))


def test_what_a_session_has_is_not_read_again():
    batch = batch_of([list(range(10, 40))], SamplingParams(), reused=28)
    (part,) = batch.parts
    assert part.tokens[0, :2].tolist() == [38, 39]
    assert (part.lengths.tolist(), part.kept.tolist()) == ([2], [28])
    assert batch_of([[5] * 100] * 2, SamplingParams(), chunk=64).parts[0].tokens.shape == (2, 32)


def test_a_short_answer_does_not_get_a_long_cache(monkeypatch):
    monkeypatch.setattr("infer.engine.call.ROOM", 60)
    for limit, sizes in ((20, (64, 64)), (100, (64, 128)), (None, (64, 256))):
        batch = batch_of([[5, 6, 7]], SamplingParams(max_new_tokens=limit))
        assert (batch.cache_size, batch.largest_cache) == sizes


def test_statistics_of_rows_and_of_calls():
    rows = [
        Stats(2.0, 0.5, 10, 0.4, 0, 3, 1.0, passes=2, drafted_tokens=4, programs=3),
        Stats(2.0, 0.5, 20, 0.4, 5, 1, 0.2, passes=1, drafted_tokens=2, programs=3),
    ]
    call = together(rows)
    assert call == Stats(2.0, 0.5, 30, 0.4, 5, 4, 1.0, passes=2, drafted_tokens=6, programs=3)
    total = add_stats(add_stats(None, call), call)
    assert total == Stats(4.0, 0.5, 60, 0.8, 10, 8, 2.0, passes=4, drafted_tokens=12, programs=6)
    assert total.decode_rate == 4 and Stats().decode_rate == 0


@pytest.fixture(scope="module")
def engine():
    return toy_engine(share=warm_engine(), max_length=64)


def test_prompts_may_be_any_kind_of_list(engine):
    want = engine.generate([[5, 6]], **SHORT)
    for prompts in (np.array([[5, 6]]), [range(5, 7)], ((5, 6),), (list(ids) for ids in [(5, 6)])):
        assert engine.generate(prompts, **SHORT) == want
    assert engine.complete(np.array([[5, 6]]), SamplingParams(**SHORT)) == want
    questions = (text for text in ["hi"])
    assert engine.generate(questions, **SHORT) == engine.generate(["hi"], **SHORT)
    assert engine.chat("hi", None, **SHORT) == engine.chat("hi", **SHORT)


@pytest.mark.parametrize(
    ("sampling", "row_ids", "error"),
    [
        (None, None, "SamplingParams"),
        ([SamplingParams()], None, "one for each prompt"),
        ([SamplingParams(), {}], None, "one for each prompt"),
        (SamplingParams(), [1], "expected 2 row_ids, one for each prompt, got 1"),
        (SamplingParams(), [0, 2**31], "row_ids must be a whole number, 0 to"),
        (SamplingParams(), [0, "a"], "row_ids must be a whole number, 0 to"),
    ],
)
def test_wrong_parameters_are_refused(sampling, row_ids, error):
    with pytest.raises(UsageError, match=error):
        batch_of([[5], [6]], sampling, row_ids)


def test_what_is_not_a_prompt_or_an_argument_is_refused(engine):
    for prompts in ("hi", b"hi", None, 5, [5, 6], ["hi", [5]], [{"a": 1}]):
        with pytest.raises(UsageError, match="must be a"):
            engine.generate(prompts, **SHORT)
        with pytest.raises(UsageError, match="must be a list of"):
            engine.run(prompts, SamplingParams())
    for token in (5.0, True, None, "5", [5], -1, 640, 10**30):
        with pytest.raises(InputError, match="prompt 1 has the token id"):
            engine.generate([[5, token]])
    for prompts in ([], [[]], [[5], []]):
        with pytest.raises(InputError, match="no prompts|is empty"):
            engine.generate(prompts)
    for bad in ({"preset": ["api"]}, {"num_beams": np.array([1, 1])}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            engine.generate(["hi"], **bad)
    for path in ("", 5, b"x"):
        with pytest.raises(UsageError, match="path"):
            infer.load(path)
    with pytest.raises(UsageError, match="dtype"):
        infer.load(dtype=np.dtype("float32"))
