"""The worker: many threads submit and cancel, one answers."""

import queue
import threading
import time

import numpy as np
import pytest

from infer.batching.job import Busy, Failure
from infer.batching.options import BatchOptions
from infer.batching.worker import Worker
from infer.engine.params import SamplingParams
from tests.support.engine_toy import finished, toy_engine

OPTIONS = BatchOptions(slots=4, size=64, tokens_per_prefill=64, queue=60)


@pytest.fixture(scope="module")
def engine():
    return toy_engine(max_length=64)


@pytest.fixture
def worker(engine):
    worker = Worker(engine, OPTIONS)
    worker.start()
    yield worker
    worker.stop()


def ask(worker, ids, sampling, **more):
    """Wait for an answer, as a thread of a server does."""
    events: queue.SimpleQueue = queue.SimpleQueue()
    job = worker.job(ids, sampling, events.put, **more)
    worker.submit(job)
    while True:
        event = events.get(timeout=120)
        if isinstance(event, Failure) or event.completion:
            return event


def test_threads_get_their_own_answers(engine, worker):
    """64 of them, each with a prompt, a seed and a limit of its own."""
    rng, got = np.random.default_rng(0), {}
    asked = [
        (rng.integers(3, 600, rng.integers(1, 40)).tolist(), int(rng.integers(1, 20)))
        for _ in range(64)
    ]

    def thread(number: int) -> None:
        ids, limit = asked[number]
        sampling = SamplingParams(temperature=1, seed=number, max_new_tokens=limit)
        got[number] = ask(worker, ids, sampling, client=str(number % 5)).completion

    threads = [threading.Thread(target=thread, args=(n,)) for n in range(64)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for number, (ids, limit) in enumerate(asked):
        sampling = SamplingParams(temperature=1, seed=number, max_new_tokens=limit)
        assert got[number].output_ids == finished(engine.run([ids], sampling)).output_ids
    assert (worker.status.running, worker.status.waiting, worker.status.age) == (0, 0, 0)


def test_a_full_queue_and_a_listener_that_fails(engine, capfd):
    def listener(event):
        raise RuntimeError("not caught by the listener")

    worker = Worker(engine, OPTIONS)  # not started: nothing ends
    jobs = [worker.job([5, 6], SamplingParams(max_new_tokens=2), listener) for _ in range(65)]
    with pytest.raises(Busy, match="no room for 65 more requests: 0 are"):
        worker.submit(*jobs)
    worker.submit(*jobs[:64])
    with pytest.raises(Busy, match="no room for 1 more requests: 64 are"):
        worker.submit(jobs[64])
    for seconds, wait in ((0, 1), (0.5, 8), (100, 60)):  # of recent answers
        worker._batcher.answer_s = seconds
        with pytest.raises(Busy) as caught:
            worker.submit(jobs[64])
        assert caught.value.retry_after == wait  # 64 wait for 4 slots
    for job in jobs[::2]:
        worker.cancel(job)
    worker.start()
    assert ask_when_there_is_room(worker, [5]).completion
    worker.drain()
    worker.stop()
    assert "not caught by the listener" in capfd.readouterr().err


def ask_when_there_is_room(worker, ids):
    while True:
        try:
            return ask(worker, ids, SamplingParams(max_new_tokens=2))
        except Busy:
            time.sleep(0.01)


def test_draining_and_stopping(engine):
    worker, heard = Worker(engine, OPTIONS), []
    worker.start()
    job = worker.job([5, 6], SamplingParams(max_new_tokens=30), heard.append)
    worker.submit(job)
    worker.drain()
    assert heard[-1].completion
    with pytest.raises(Busy, match="stopping"):
        worker.submit(job)
    worker.stop()
    assert not worker.status.alive

    worker, heard = Worker(engine, OPTIONS), []
    worker.start()
    worker.submit(worker.job([5, 6], SamplingParams(max_new_tokens=58), heard.append))
    worker.stop()
    assert heard[-1].reason == "stopping"
