"""A session: the engine's tokens, with only the new part of a prompt read; and its threads."""

import dataclasses
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np
import pytest

from glm2_jax.errors import CheckpointError, DeviceError, InputError, UsageError
from infer.engine.params import SamplingParams
from infer.engine.programs import Programs
from infer.engine.session import Session
from tests.support.engine_toy import (
    cache_bytes,
    compilations,
    failing,
    finished,
    streamed,
    toy_engine,
    toy_params,
    warm_engine,
)

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
PROMPT = list(range(10, 40))


@pytest.fixture(scope="module")
def engine():
    return toy_engine(share=warm_engine())


def ask(session, ids, sampling=GREEDY, **kwargs):
    """The completion, checked against the engine's, and how many tokens were read for it."""
    completion = finished(session.run(ids, sampling, **kwargs))
    stats = completion.stats
    assert stats.prefill_tokens + stats.reused_tokens == len(ids)
    offset = {"row_ids": [kwargs.pop("draw")]} if "draw" in kwargs else {}
    assert finished(session.engine.run([ids], sampling, **offset, **kwargs)) == completion
    return completion, stats.prefill_tokens


def test_only_what_is_new_is_read(engine):
    session = Session(engine)
    first, read = ask(session, PROMPT)
    assert read == 30
    assert session.ids == [*PROMPT, *first.output_ids[:-1]]  # the last one was never fed

    grown = [*PROMPT, *first.output_ids, 7, 8, 9]
    second, read = ask(session, grown)
    assert read == 1 + 3  # the last token of the answer, and what follows it

    again, read = ask(session, grown)
    assert again == second and read == 1  # the last token has to be read

    _, read = ask(session, PROMPT)  # both rounds taken back
    assert read == 1

    edited = [*PROMPT[:20], 99, *PROMPT[21:]]
    _, read = ask(session, edited)
    assert read == 10
    _, read = ask(session, [50, 51])
    assert read == 2

    session = Session(toy_engine(share=engine, prefill_chunk=16))
    for new, expected in ((PROMPT, 60), (range(200, 220), 20)):
        assert ask(session, [*PROMPT, *new])[1] == expected


def test_the_same_random_answers_as_the_engine(engine):
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=12, seed=3)
    session = Session(engine)
    first, _ = ask(session, PROMPT, sampling)
    again, read = ask(session, PROMPT, sampling)
    other, _ = ask(session, PROMPT, sampling, draw=1)
    assert again == first and read == 1 and other.output_ids != first.output_ids
    # The repetition penalty counts the complete conversation, not what is read of it.
    heavy = SamplingParams(temperature=0, max_new_tokens=10, repetition_penalty=1e6)
    first, _ = ask(session, [5, 6, 7], heavy)
    grown = [5, 6, 7, *first.output_ids, 300]
    second, read = ask(session, grown, heavy)
    assert read == 2 and len({*grown, *second.output_ids}) == 3 + 10 + 1 + 10


def test_the_cache_grows_and_nothing_recompiles_once_warm():
    engine = toy_engine()
    session = Session(engine)

    def conversation():
        sizes, ids = [], list(PROMPT)
        for _ in range(5):
            completion = finished(session.run(ids, GREEDY))
            sizes.append(session._cache.size)
            ids += [*completion.output_ids, 5, 6, 7]
        return sizes, completion

    sizes, cold = conversation()
    assert sizes == [64, 64, 128, 128, 128]
    assert engine.programs.compiled == 6  # extend and decode twice, pick, grow
    conversation()  # in the large cache from the start
    with compilations() as counted:
        assert conversation() == ([128] * 5, cold)
    assert engine.programs.compiled == 6 and not counted


def test_up_to_the_last_slot(engine):
    engine = toy_engine(share=engine, max_length=64)
    sampling = SamplingParams(temperature=0)
    session = Session(engine)
    ask(session, [5] * 20, SamplingParams(temperature=0, max_new_tokens=3))
    completion, read = ask(session, [*[5] * 20, *[9] * 38], sampling)
    assert read == 38 and len(completion.output_ids) == 6
    _, read = ask(session, [*[5] * 20, *[9] * 43], sampling)
    assert read == 5
    with pytest.raises(InputError, match="64 tokens"):
        session.run([5] * 64, sampling)
    for bad in ([], [640], [5, -1]):
        with pytest.raises(InputError):
            session.run(bad, sampling)
    ask(session, [5] * 20)  # refused prompts leave no trace


def test_an_answer_may_be_left_early(engine):
    for steps in (0, 1, 5):
        session = Session(engine)
        whole, _ = ask(session, PROMPT)
        events = session.run(PROMPT, GREEDY)
        tokens = [next(events).token for _ in range(steps)]
        # The next call closes it. Not started, the first answer is still in the cache.
        _, read = ask(session, [*PROMPT, *tokens, 7, 8])
        assert tokens == list(whole.output_ids[:steps]) and list(events) == []
        assert read == (2 if steps == 0 else 1 + 2)


def in_a_thread(function, *args):
    """What a call in another thread gives, or raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def held(events, reading, go_on):
    """The events, after another thread has seen that they are being read."""
    reading.set()
    go_on.wait(60)
    yield from events


def test_an_answer_that_another_thread_reads_is_not_ended(engine):
    session = Session(engine)
    whole, _ = ask(session, PROMPT)
    events = session.run(PROMPT, GREEDY)
    for _ in range(3):  # not begun, begun, and going on
        with pytest.raises(UsageError, match="answering in another thread, MainThread"):
            in_a_thread(session.run, PROMPT, GREEDY)
        next(events)
    reading, go_on = threading.Event(), threading.Event()
    slow = session.run(PROMPT, GREEDY)
    slow._events = held(slow._events, reading, go_on)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(list, slow)  # its generator is executing
        reading.wait(60)
        with pytest.raises(UsageError, match="Read that answer to its end"):
            in_a_thread(session.run, PROMPT, GREEDY)
        for call in (lambda: session.run(PROMPT, GREEDY), session.close):
            with pytest.raises(UsageError, match="answering in another thread"):
                call()  # in the thread that asked, and handed the iterator on
        with pytest.raises(ValueError, match="already executing"):
            next(slow)
        go_on.set()
        assert answer.result()[-1].completion == whole
    assert in_a_thread(ask, session, PROMPT)[0] == whole  # one after the other
    in_a_thread(next, session.run(PROMPT, GREEDY))
    session.close()
    assert in_a_thread(ask, session, PROMPT)[0] == whole
    in_a_thread(lambda: next(session.run(PROMPT, GREEDY)))  # left by a thread that has ended
    assert ask(session, PROMPT)[0] == whole


LEFT = """
import threading
from glm2_jax.runtime import buckets
from infer.engine.call import closed_at_exit
from infer.engine.params import SamplingParams
from infer.engine.session import Session
from infer.requests.conversation import Conversation
from tests.support.engine_toy import toy_engine
buckets.SMALLEST_BUCKET = 256  # one shape, so few programs
engine, greedy = toy_engine(), SamplingParams(temperature=0)
left = [
    engine.stream_chat("hi", temperature=0, cumulative=True),
    Session(engine).run([5, 6], greedy),
    Conversation(engine, greedy).reply("hi"),
]
again = Conversation(engine, greedy)
again.replace([("hi", "ho")], None)
left.append(again.retry())
for iterator in left:
    next(iterator)
def busy():
    yield
    begun.set()
    threading.Event().wait()
begun = threading.Event()
endless = closed_at_exit(busy())
threading.Thread(target=list, args=(endless,), daemon=True).start()
begun.wait()
print(len(left))
"""


def test_iterators_that_are_left_at_the_end_of_the_program_say_nothing():
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("4\n", "")


def test_an_answer_that_a_stop_string_or_an_end_token_ended(engine):
    session = Session(engine)
    plain, _ = ask(session, PROMPT)
    stop = plain.text[2:4]
    completion, _ = ask(session, PROMPT, dataclasses.replace(GREEDY, stop=(stop,)))
    assert completion.finish_reason == "stop"
    ask(session, [*PROMPT, *completion.output_ids, 7])

    ending = toy_engine(share=engine)
    ending.stop_ids = (plain.output_ids[4],)
    session = Session(ending)
    completion, _ = ask(session, PROMPT)
    assert completion.finish_reason == "stop"
    assert session.ids == [*PROMPT, *completion.output_ids]
    _, read = ask(session, [*PROMPT, *completion.output_ids, 7])
    assert read == 1


def test_after_an_error_everything_is_read_again(engine):
    session = Session(engine)
    ask(session, PROMPT)
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    with failing(engine, 3, full), pytest.raises(DeviceError, match="memory: a prompt of 30 tok"):
        list(session.run(PROMPT, GREEDY))
    assert session.ids == []
    _, read = ask(session, PROMPT)
    assert read == 30
    memory = engine.programs._programs["extend", (1, 64, 64)].memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes(64)  # donated
    embed = np.array(toy_params()["embed"])
    embed[77] = np.nan
    damaged = toy_engine({**toy_params(), "embed": jax.numpy.asarray(embed)}, share=engine)
    session = Session(damaged)
    ask(session, PROMPT)
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        list(session.run([*PROMPT, 77, 78], GREEDY))
    ask(session, PROMPT)


THREADS = 8
PROMPTS = [[5, 6, 7], [9]]
HOT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 10}


def ask_any(engine, number: int):
    """Stream, answer a batch or hold a conversation; what came of it."""
    sampling = SamplingParams(**HOT, seed=number, logprobs=number % 3 or None)
    if number % 4 == 0:
        return streamed(engine, PROMPTS[:1], sampling)
    if number % 4 == 1:
        return engine.complete(PROMPTS, sampling)
    if number % 4 == 2:
        return ["".join(text for _, text in engine.stream(["hi"], **HOT, seed=number))]
    session, ids, said = Session(engine), [5, 6, 7], []
    for _ in range(2):
        said.append(finished(session.run(ids, sampling)))
        ids = [*ids, *said[-1].output_ids, 8]
    return said


def test_a_fresh_engine_called_by_many_threads_answers_as_alone():
    compiled, started = [], threading.Barrier(THREADS)
    engine = toy_engine(on_event=lambda kind, text: compiled.append(text.split(" (")[0]))

    def work(number: int):
        started.wait(60)
        return [ask_any(engine, number), ask_any(engine, number + 1)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, range(THREADS)))
    alone = toy_engine(share=warm_engine())
    assert found == [[ask_any(alone, n), ask_any(alone, n + 1)] for n in range(THREADS)]
    assert len(compiled) == len(set(compiled)) == engine.programs.compiled  # each one once


def test_compiling_that_fails_in_one_thread_leaves_the_others_to_try(monkeypatch):
    programs, ones = Programs("cpu"), np.ones(3)
    real, failures = programs._compile, iter([True])

    def fails_once(*args):
        if next(failures, False):
            raise jax.errors.JaxRuntimeError("INTERNAL: no")
        return real(*args)

    monkeypatch.setattr(programs, "_compile", fails_once)
    with ThreadPoolExecutor(THREADS) as pool:
        double = partial(programs.call, "double", 3, lambda x: x * 2, ones)
        calls = [pool.submit(double) for _ in range(THREADS)]
        errors = [call.exception() for call in calls]
    assert sum(map(bool, errors)) == programs.compiled == 1
    good = [call.result() for call, error in zip(calls, errors, strict=True) if error is None]
    assert all(result.tolist() == [2, 2, 2] for result in good)
