"""The engine's loops: equal to each other, alone and in a batch, and to plain forward."""

import contextlib

import jax
import numpy as np
import pytest

from glm2_jax import forward, init_params
from glm2_jax.errors import CheckpointError, DeviceError, InputError, UsageError
from glm2_jax.runtime import buckets
from glm2_jax.runtime.devices import device_errors
from infer.engine.params import SamplingParams
from tests.support.engine_toy import (
    TOY,
    cache_bytes,
    compilations,
    failing,
    streamed,
    toy_engine,
    toy_params,
    warm_engine,
)

PROMPTS = [[5, 6, 7], [9], list(range(10, 80)), [300, 4, 300, 4, 21]]
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
HOT = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def engine():
    return toy_engine(share=warm_engine())


def test_greedy_equals_the_plain_forward(engine):
    model = jax.jit(forward, static_argnums=0)
    for ids, completion in zip(PROMPTS, engine.complete(PROMPTS, GREEDY), strict=True):
        tokens = np.zeros((1, 96), np.int32)  # of one shape: compiled once
        tokens[0, : len(ids) + 12] = [*ids, *completion.output_ids]
        logits = model(TOY, toy_params(), tokens)[0]
        drawn = np.argmax(logits[0, len(ids) - 1 : len(ids) + 11], axis=-1)
        assert tuple(drawn) == completion.output_ids


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(**HOT, seed=3)])
def test_both_loops_single_and_batch_give_the_same_answers(engine, sampling):
    batch = engine.complete(PROMPTS, sampling)
    assert streamed(engine, PROMPTS, sampling) == batch
    for row in (0, 1, 3):  # row 2 is in the next bucket: its programs would be three more
        assert engine.complete([PROMPTS[row]], sampling, row_ids=[row]) == [batch[row]]
        assert streamed(engine, [PROMPTS[row]], sampling, row_ids=[row]) == [batch[row]]
    assert engine.complete(PROMPTS[:3], sampling) == batch[:3]  # an empty fourth row
    assert len({completion.output_ids for completion in batch}) == 4
    order = [3, 1, 0]
    mixed = engine.complete([PROMPTS[row] for row in order], sampling, row_ids=order)
    assert mixed == [batch[row] for row in order]


def test_seeds_and_rows_have_their_own_random_numbers(engine):
    seeds = [SamplingParams(**HOT, seed=seed) for seed in (3, 4, 3, 3)]
    one, other, *_ = engine.complete([PROMPTS[2]] * 4, seeds, row_ids=[0, 0, 0, 1])
    twins = engine.complete([PROMPTS[2]] * 4, seeds[0])
    assert one == twins[0] != other and len({twin.output_ids for twin in twins}) == 4


def test_logprobs_are_the_same_in_both_loops(engine):
    sampling = SamplingParams(temperature=0, max_new_tokens=3, logprobs=2)
    (completion,) = engine.complete([[5, 6, 7]], sampling)
    assert streamed(engine, [[5, 6, 7]], sampling)[0].output_ids == completion.output_ids
    assert completion.logprobs is not None
    assert [entry.token for entry in completion.logprobs] == list(completion.output_ids)
    logits, _ = forward(TOY, toy_params(), np.array([[5, 6, 7]]))
    expected = np.asarray(logits[0, -1], np.float64)
    expected -= np.log(np.exp(expected).sum())
    first = completion.logprobs[0]
    assert first.logprob == pytest.approx(expected.max(), abs=1e-4)
    assert first.top[0] == (first.token, pytest.approx(first.logprob))
    assert [token for token, _ in first.top] == np.argsort(-expected)[:2].tolist()
    assert engine.complete([[5, 6, 7]], GREEDY)[0].logprobs is None


def test_rows_end_one_by_one_at_an_end_token(engine):
    unhurt = engine.complete(PROMPTS, GREEDY)
    ids = unhurt[0].output_ids
    ending = toy_engine(share=engine)
    ending.stop_ids = (ids[4],)  # pretend that what row 0 says there is the end token
    batch = ending.complete(PROMPTS, GREEDY)
    assert batch[0].output_ids == ids[: ids.index(ids[4])]
    assert batch[0].finish_reason == "stop"
    assert streamed(ending, PROMPTS, GREEDY) == batch
    going = [row for row in range(4) if ids[4] not in unhurt[row].output_ids]
    assert going and all(batch[row] == unhurt[row] for row in going)
    events = list(ending.run([[5, 6, 7]], GREEDY))
    assert events[-1].token is None and events[-1].finish_reason == "stop"
    special = toy_engine(family="chatglm3").tokenizer.special
    glm3 = set(toy_engine(family="chatglm3").stop_ids)
    assert glm3 == {2, special["<|user|>"], special["<|observation|>"]}


def test_lengths(engine):
    short = SamplingParams(temperature=0, max_length=16, max_new_tokens=100)
    assert len(engine.complete([[5] * 10], short)[0].output_ids) == 6
    for sampling in (SamplingParams(temperature=0), SamplingParams(temperature=0, max_length=999)):
        whole = engine.complete([[5] * 250, [5] * 255], sampling)
        assert [len(c.output_ids) for c in whole] == [6, 1]
        assert {c.finish_reason for c in whole} == {"length"}
    for length, sampling in ((256, {}), (20, {"max_length": 20})):
        room = sampling.get("max_length", 256)
        for call in (engine.run, engine.complete):
            with pytest.raises(InputError, match=f"prompt 2 has {length} tokens.* {room}"):
                call([[5], [5] * length], SamplingParams(**sampling))
    assert toy_engine(max_length=np.int64(100)).max_length == 100
    assert toy_engine(max_length=1000).max_length == 256
    for name, bad in (("max_length", 1), ("max_length", 1.5), ("prefill_chunk", 0)):
        with pytest.raises(UsageError, match=f"{name} must be a whole number"):
            toy_engine(**{name: bad})


def damaged(name, value, row):
    array = np.array(toy_params()[name])
    array[row] = value
    return {**toy_params(), name: jax.numpy.asarray(array)}


def test_nan_names_its_step(engine):
    ids = engine.complete([[5, 6, 7]], GREEDY)[0].output_ids
    step = next(n for n in range(1, 12) if ids[n] not in ids[:n] and ids[n] not in (5, 6, 7))
    # The embedding of that token is damaged: the step after it was drawn fails.
    for params, at in (
        (damaged("final_norm", np.inf, 3), 1),
        (damaged("embed", np.nan, ids[step]), step + 2),
    ):
        hurt = toy_engine(params, share=engine)
        events = hurt.run([[5, 6, 7]], GREEDY)
        assert [next(events).token for _ in range(at - 1)] == list(ids[: at - 1])
        said = f"NaN or Inf at step {at} of the answer to prompt 1"
        with pytest.raises(CheckpointError, match=said):
            next(events)
        with pytest.raises(CheckpointError, match=said) as error:
            hurt.complete([[5, 6, 7]], GREEDY)
        assert error.value.exit_code == 4


def test_out_of_memory_is_a_device_error(engine):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    message = r"out of device memory(.|\n)*cache of 64 slots(.|\n)*9 bytes"
    for call in (engine.complete, lambda *args: list(engine.run(*args))):
        with failing(engine, 2, full), pytest.raises(DeviceError, match=message) as error:
            call([[5]], GREEDY)
        assert error.value.exit_code == 5
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), device_errors(""):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.parametrize("speculate", [0, 4])
def test_a_call_may_be_left_or_interrupted(engine, speculate):
    expected = engine.complete(PROMPTS, GREEDY)
    one = toy_engine(share=engine, speculate=speculate)
    for steps in range(3):
        events = one.run(PROMPTS, GREEDY)
        for _ in range(steps):
            next(events)
        events.close()
    abandoned = one.run(PROMPTS, GREEDY)
    next(abandoned)
    with failing(one, 3, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        list(one.run(PROMPTS, GREEDY))
    assert streamed(one, PROMPTS, GREEDY) == expected
    # One that was set aside continues where it was.
    done = [event.completion for event in abandoned if event.completion]
    assert sorted(done, key=expected.index) == expected


def test_nothing_recompiles_once_warm_and_compiling_is_not_running():
    said = []
    engine = toy_engine(on_event=lambda kind, text: said.append(kind), load_s=1.5)

    def ask(ids, **kwargs):
        sampling = SamplingParams(max_new_tokens=5, **kwargs)
        list(engine.run([ids], sampling))
        return engine.complete([ids], sampling)[0].stats

    with compilations() as counted:
        (answer,) = streamed(engine, [[5, 6, 7]], SamplingParams(max_new_tokens=5))
        cold = answer.stats
        assert cold.compile_s > cold.first_token_s >= cold.prefill_s > 0
        assert (cold.prefill_tokens, cold.decode_tokens, cold.programs) == (3, 4, 3)
        ask([5, 6, 7])
        assert engine.programs.compiled == 3  # prefill, pick, decode
        assert said == ["compile"] * 3
        assert counted, "the event has another name in this jax"
        del counted[:]
        ask([8], temperature=0)
        ask(list(range(50)), temperature=1.5, top_k=0, top_p=0.3, seed=2**40)
        ask([9, 9], repetition_penalty=1.3, logprobs=5, stop=("a",), loop_stop=3)
        assert engine.programs.compiled == 3 and not counted
    warm = ask([5, 6], temperature=0)
    assert warm.compile_s == 0 and engine.load_s == 1.5
    assert (warm.prefill_tokens, warm.decode_tokens) == (2, 4)
    assert warm.decode_s > 0 and warm.decode_rate == warm.decode_tokens / warm.decode_s
    assert warm.prefill_rate == warm.prefill_tokens / warm.prefill_s
    for at, donated in (
        (("decode", (1, 64)), cache_bytes(64)),
        (("pick", (1, 1)), 2 * TOY.vocab_size),
    ):
        assert engine.programs._programs[at].memory_analysis().alias_size_in_bytes >= donated


def test_growing_changes_no_answer_and_nothing_recompiles_once_warm(engine, monkeypatch):
    sampling = SamplingParams(temperature=0.9, top_p=1.0, max_new_tokens=34, seed=5)
    prompts = [[5, 6, 7], [300, 4, 300, 4, 21, 9, 9]]
    whole = engine.complete(prompts, sampling)
    monkeypatch.setattr(buckets, "SMALLEST_BUCKET", 16)  # the cache begins with 16 slots, ...
    monkeypatch.setattr("infer.engine.call.ROOM", 4)  # ... of which 4 at least are for the answers
    small = toy_engine()

    assert streamed(small, prompts, sampling) == small.complete(prompts, sampling) == whole
    keys = sorted(small.programs._programs)
    steps_of = [("decode", (2, 16)), ("decode", (2, 64))]
    assert keys == [*steps_of, ("grow", (2, 16, 64)), ("pick", (2, 1)), ("prefill", (2, 16, 16))]
    with compilations() as counted:
        assert streamed(small, prompts, sampling) == small.complete(prompts, sampling) == whole
    assert small.programs.compiled == len(keys) and not counted


def test_answers_do_not_depend_on_the_switches_of_jax():
    sampling = SamplingParams(
        temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.2, logprobs=2, max_new_tokens=2
    )
    toy_params()  # made before anything is switched
    found = []
    for switch in (contextlib.nullcontext(), jax.enable_x64(True), jax.disable_jit(True)):
        with switch:
            found += streamed(toy_engine(max_length=64), [[5, 6, 7]], sampling)
    usual, *others = found
    for other in others:
        assert (other.output_ids, other.text) == (usual.output_ids, usual.text)
        for a, b in zip(usual.logprobs, other.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    embed = init_params(TOY, jax.random.key(0))["embed"]
    with jax.enable_x64(True):
        np.testing.assert_array_equal(init_params(TOY, jax.random.key(0))["embed"], embed)
