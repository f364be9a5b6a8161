"""One engine and several threads, its programs not compiled yet: the tokens of calls alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np

from infer.engine.params import SamplingParams
from infer.engine.programs import Programs
from infer.engine.session import Session
from tests.support.engine_toy import finished, streamed, toy_engine, warm_engine

THREADS = 8
PROMPTS = [[5, 6, 7], [9], [300, 4, 300, 4, 21]]
HOT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 10}


def ask(engine, number: int):
    """Stream, answer a batch or hold a conversation; what came of it."""
    sampling = SamplingParams(**HOT, seed=number, logprobs=number % 3 or None)
    if number % 4 == 0:
        return streamed(engine, PROMPTS[:1], sampling)
    if number % 4 == 1:
        return engine.complete(PROMPTS[:2], sampling)
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
        return [ask(engine, number), ask(engine, number + 1)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, range(THREADS)))
    alone = toy_engine(share=warm_engine())
    assert found == [[ask(alone, n), ask(alone, n + 1)] for n in range(THREADS)]
    assert len(compiled) == len(set(compiled)) == engine.programs.compiled  # each one once


def test_compiling_that_fails_in_one_thread_leaves_the_others_to_try(monkeypatch):
    programs, ones = Programs("cpu"), np.ones(3)
    real, failures = programs._compile, iter([True])

    def failing(*args):
        if next(failures, False):
            raise jax.errors.JaxRuntimeError("INTERNAL: no")
        return real(*args)

    monkeypatch.setattr(programs, "_compile", failing)
    with ThreadPoolExecutor(THREADS) as pool:
        double = partial(programs.call, "double", 3, lambda x: x * 2, ones)
        calls = [pool.submit(double) for _ in range(THREADS)]
        errors = [call.exception() for call in calls]
    assert sum(map(bool, errors)) == programs.compiled == 1
    good = [call.result() for call, error in zip(calls, errors, strict=True) if error is None]
    assert all(result.tolist() == [2, 2, 2] for result in good)
