"""The two loops of the engine: equal to each other, alone and in a batch, and to plain forward."""

import jax
import numpy as np
import pytest

from glm2_jax import forward
from glm2_jax.errors import CheckpointError, DeviceError, InputError, UsageError
from glm2_jax.runtime.devices import device_errors
from infer.engine.params import SamplingParams
from tests.support.engine_toy import (
    TOY,
    compilations,
    streamed,
    toy_engine,
    toy_params,
    warm_engine,
)

PROMPTS = [[5, 6, 7], [9], list(range(10, 80)), [300, 4, 300, 4, 21]]
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def engine():
    return toy_engine(share=warm_engine())


def test_greedy_equals_the_plain_forward(engine):
    for ids, completion in zip(PROMPTS, engine.complete(PROMPTS, GREEDY), strict=True):
        tokens = np.array([[*ids, *completion.output_ids]])
        logits = jax.jit(forward, static_argnums=0)(TOY, toy_params(), tokens)[0]
        drawn = np.argmax(logits[0, len(ids) - 1 : -1], axis=-1)
        assert tuple(drawn) == completion.output_ids


def test_both_loops_single_and_batch_give_the_same_greedy_answers(engine):
    batch = engine.complete(PROMPTS, GREEDY)
    assert streamed(engine, PROMPTS, GREEDY) == batch
    for row in (0, 1, 3):  # row 2 is in the next bucket: its programs would be three more
        assert engine.complete([PROMPTS[row]], GREEDY) == [batch[row]]
        assert streamed(engine, [PROMPTS[row]], GREEDY) == [batch[row]]
    assert engine.complete(PROMPTS[:3], GREEDY) == batch[:3]  # an empty fourth row
    assert len({completion.output_ids for completion in batch}) == 4


def test_the_same_seed_draws_the_same_tokens_everywhere(engine):
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=12, seed=3)
    batch = engine.complete(PROMPTS, sampling)
    assert streamed(engine, PROMPTS, sampling) == batch
    for row in (0, 1, 3):
        assert engine.complete([PROMPTS[row]], sampling, row_ids=[row]) == [batch[row]]
    order = [3, 1, 0]
    mixed = engine.complete([PROMPTS[row] for row in order], sampling, row_ids=order)
    assert mixed == [batch[row] for row in order]
    other = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=12, seed=4)
    assert engine.complete(PROMPTS, other) != batch
    twins = engine.complete([PROMPTS[2]] * 4, sampling)
    assert len({twin.output_ids for twin in twins}) == 4  # rows have their own random numbers


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


def test_repetition_penalty_counts_prompt_and_answer(engine):
    plain = engine.complete([[5, 6, 7]], GREEDY)[0].output_ids
    assert len(set(plain)) < len(plain)
    heavy = SamplingParams(temperature=0, max_new_tokens=40, repetition_penalty=1e6)
    ids = engine.complete([[5, 6, 7]], heavy)[0].output_ids
    assert len(set(ids) | {5, 6, 7}) == 43


def test_rows_end_one_by_one_at_an_end_token(engine):
    ids = engine.complete([[5, 6, 7]], GREEDY)[0].output_ids
    end = ids[4]  # pretend that what row 0 says there is the end token
    first = ids.index(end)
    engine_with_end = toy_engine(share=engine)
    engine_with_end._stop_ids = (end,)
    batch = engine_with_end.complete(PROMPTS, GREEDY)
    assert batch[0].output_ids == ids[:first]
    assert batch[0].finish_reason == "stop"
    assert streamed(engine_with_end, PROMPTS, GREEDY) == batch
    unhurt = engine.complete(PROMPTS, GREEDY)
    going = [row for row in range(4) if end not in unhurt[row].output_ids]
    assert going and all(batch[row] == unhurt[row] for row in going)
    events = list(engine_with_end.run([[5, 6, 7]], GREEDY))
    assert events[-1].token is None and events[-1].finish_reason == "stop"


def test_chatglm3_ends_at_the_next_role():
    engine = toy_engine(family="chatglm3")
    special = engine.tokenizer.special
    assert set(engine._stop_ids) == {2, special["<|user|>"], special["<|observation|>"]}


def test_lengths(engine):
    short = SamplingParams(temperature=0, max_length=16, max_new_tokens=100)
    assert len(engine.complete([[5] * 10], short)[0].output_ids) == 6
    for sampling in (SamplingParams(temperature=0), SamplingParams(temperature=0, max_length=999)):
        whole = engine.complete([[5] * 250, [5] * 255], sampling)
        assert [len(c.output_ids) for c in whole] == [6, 1]
        assert {c.finish_reason for c in whole} == {"length"}
    one = SamplingParams(temperature=0, max_new_tokens=1)
    assert len(list(engine.run([[5]], one))) == 1


def test_a_prompt_without_room_is_refused_with_the_numbers(engine):
    for length, sampling in ((256, {}), (20, {"max_length": 20})):
        room = sampling.get("max_length", 256)
        for call in (engine.run, engine.complete):
            with pytest.raises(InputError, match=f"{length} tokens.* {room}"):
                call([[5], [5] * length], SamplingParams(**sampling))


def test_max_length_of_the_engine():
    assert toy_engine(max_length=100).max_length == 100
    assert toy_engine(max_length=1000).max_length == 256
    for bad in (1, 1.5, True):
        with pytest.raises(UsageError, match="max_length"):
            toy_engine(max_length=bad)


def damaged(params, name, value, row=None):
    array = np.array(params[name])
    array[row] = value
    return {**params, name: jax.numpy.asarray(array)}


def test_nan_while_reading_the_prompt(engine):
    params = damaged(toy_params(), "final_norm", np.inf, row=3)
    engine = toy_engine(params, share=engine)
    for call in (engine.complete, lambda *args: list(engine.run(*args))):
        with pytest.raises(CheckpointError, match="NaN or Inf at step 1 of the answer to prompt 1"):
            call([[5, 6, 7]], GREEDY)


def test_nan_later_names_its_step(engine):
    ids = engine.complete([[5, 6, 7]], GREEDY)[0].output_ids
    step = next(n for n in range(1, 12) if ids[n] not in ids[:n] and ids[n] not in (5, 6, 7))
    # The embedding of that token is damaged: the step after it was drawn fails.
    params = damaged(toy_params(), "embed", np.nan, row=ids[step])
    engine = toy_engine(params, share=engine)
    events = engine.run([[5, 6, 7]], GREEDY)
    assert [next(events).token for _ in range(step + 1)] == list(ids[: step + 1])
    with pytest.raises(CheckpointError, match=f"at step {step + 2} "):
        next(events)
    with pytest.raises(CheckpointError, match=f"at step {step + 2} ") as error:
        engine.complete([[5, 6, 7]], GREEDY)
    assert error.value.exit_code == 4


def test_out_of_memory_is_a_device_error(engine, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(engine.programs, "call", full)
    with pytest.raises(DeviceError, match=r"out of device memory(.|\n)*9 bytes") as error:
        engine.complete([[5]], GREEDY)
    assert error.value.exit_code == 5
    with pytest.raises(DeviceError, match="cache of 64 slots"):
        list(engine.run([[5]], GREEDY))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), device_errors(""):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_generator_may_be_left_early(engine):
    expected = engine.complete(PROMPTS, GREEDY)
    for steps in range(3):
        events = engine.run(PROMPTS, GREEDY)
        for _ in range(steps):
            next(events)
        events.close()
    abandoned = engine.run(PROMPTS, GREEDY)
    next(abandoned)
    assert streamed(engine, PROMPTS, GREEDY) == expected
    # One that was set aside continues where it was.
    done = [event.completion for event in abandoned if event.completion]
    assert sorted(done, key=expected.index) == expected


def test_an_interrupt_leaves_the_engine_usable(engine, monkeypatch):
    expected = engine.complete(PROMPTS, GREEDY)
    call, count = engine.programs.call, []

    def interrupted(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    monkeypatch.setattr(engine.programs, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(engine.run(PROMPTS, GREEDY))
    monkeypatch.undo()
    assert streamed(engine, PROMPTS, GREEDY) == expected


def test_nothing_recompiles_once_warm_and_compiling_is_told_from_running():
    told = []
    engine = toy_engine(on_event=lambda kind, text: told.append(kind), load_s=1.5)

    def ask(ids, **kwargs):
        sampling = SamplingParams(max_new_tokens=5, **kwargs)
        list(engine.run([ids], sampling))
        return engine.complete([ids], sampling)[0].stats

    with compilations() as counted:
        (answer,) = streamed(engine, [[5, 6, 7]], SamplingParams(max_new_tokens=5))
        cold = answer.stats
        assert cold.compile_s > cold.first_token_s >= cold.prefill_s > 0
        assert (cold.prefill_tokens, cold.decode_tokens, cold.programs) == (3, 4, 2)
        ask([5, 6, 7])
        assert engine.programs.compiled == 3  # prefill, decode, decode_many
        assert told == ["compile"] * 3
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


def test_the_cache_is_donated(engine):
    engine.complete([[5]], GREEDY)
    list(engine.run([[5]], GREEDY))
    cache = 2 * TOY.num_layers * 64 * TOY.num_kv_heads * TOY.head_dim * 4
    for name in ("decode", "decode_many"):
        memory = engine.programs._programs[name, (1, 64)].memory_analysis()
        assert memory.alias_size_in_bytes >= cache
