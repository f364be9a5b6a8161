"""Arguments of the Python interface that are almost right, or not at all."""

import numpy as np
import pytest

import infer
from glm2_jax.errors import InputError, UsageError
from infer.engine.params import SamplingParams
from tests.support.engine_toy import toy_engine, warm_engine

SHORT = {"temperature": 0, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def engine():
    return toy_engine(share=warm_engine(), max_length=64)


def test_prompts_may_be_any_kind_of_list(engine):
    want = engine.generate([[5, 6]], **SHORT)
    for prompts in (
        np.array([[5, 6]]),
        [np.array([5, 6])],
        [range(5, 7)],
        ((5, 6),),
        ([i for i in ids] for ids in [[5, 6]]),
    ):
        assert engine.generate(prompts, **SHORT) == want
    assert engine.complete(np.array([[5, 6]]), SamplingParams(**SHORT)) == want
    questions = (text for text in ["hi"])
    assert engine.generate(questions, **SHORT) == engine.generate(["hi"], **SHORT)


def test_what_is_not_a_list_of_prompts(engine):
    for prompts in ("hi", b"hi", None, 5, [5, 6], ["hi", [5]], [b"hi"], [{"a": 1}]):
        with pytest.raises(UsageError, match="must be a"):
            engine.generate(prompts, **SHORT)
        with pytest.raises(UsageError, match="must be a list of"):
            engine.run(prompts, SamplingParams())


def test_what_is_not_a_token_id(engine):
    for token in (5.0, True, None, "5", [5], -1, 640, 10**30):
        with pytest.raises(InputError, match="prompt 1 has the token id"):
            engine.generate([[5, token]])
    for prompts in ([], [[]], [[5], []]):
        with pytest.raises(InputError, match="no prompts|is empty"):
            engine.generate(prompts)


def test_no_history_may_be_none(engine):
    assert engine.chat("hi", None, **SHORT) == engine.chat("hi", **SHORT)
    assert list(engine.stream_chat("hi", None, **SHORT)) == list(engine.stream_chat("hi", **SHORT))
    assert engine.build_prompt("hi", None) == engine.build_prompt("hi")


def test_other_arguments(engine):
    for rows in ([-1], ["a"]):
        with pytest.raises(UsageError, match="row_ids"):
            engine.run([[5]], SamplingParams(), row_ids=rows)
    for bad in (0, 1.5, True, "8"):
        with pytest.raises(UsageError, match="prefill_chunk must be a whole number, 1 or more"):
            toy_engine(prefill_chunk=bad)
    for bad in ({"preset": ["api"]}, {"num_beams": np.array([1, 1])}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            engine.generate(["hi"], **bad)
    with pytest.raises(UsageError, match="(?s)temprature.*Did you mean temperature"):
        engine.generate(["hi"], temprature=1)
    for path in ("", 5, b"x"):
        with pytest.raises(UsageError, match="path"):
            infer.load(path)
    with pytest.raises(UsageError, match="dtype"):
        infer.load(dtype=np.dtype("float32"))
    assert toy_engine(max_length=np.int64(50)).max_length == 50
