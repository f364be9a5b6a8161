"""The engine's programs, compiled and ready to be timed: prefill, and decode steps after it.

B rows, T prompt length. On a mesh all arrays are placed as the engine places them; rows that fill
up a batch are computed like others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, KVCache
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.runtime.buckets import bucket
from infer.engine import steps
from infer.engine.call import ROOM, parts
from infer.engine.executor import Executor
from infer.engine.params import SamplingParams
from infer.engine.sampling import Sampling

Run = Callable[[], float]  # does the work once and returns its seconds


class Workload:
    """What is timed of one model.

    Attributes:
        programs: compiles, and counts the seconds of it.
    """

    def __init__(self, config: GLMConfig, params: Any):
        self.config, self._executor = config, Executor(config, params)
        self.programs = self._executor.programs

    def prefill(self, batch: int, length: int) -> Run:
        """Prefill `batch` prompts of `length` tokens, and draw the first token of each answer."""
        batch, executor = self._filled(batch), self._executor
        random = np.random.default_rng(0)
        prompts = random.integers(3, self.config.vocab_size, (batch, length)).tolist()
        longest = min(max(1, PREFILL_CHUNK // batch), self.config.seq_length)
        *full, last = parts(prompts, 0, batch, longest)
        size = bucket(length + ROOM, self.config.seq_length)
        controls = self._controls(batch)
        cache = executor.new_cache(batch, size) if full else None
        seen = np.zeros((batch, self.config.vocab_size), bool)

        def run() -> float:
            nonlocal cache
            start = time.perf_counter()
            if cache is None:
                _, output = executor.prefill(last, size, controls)
                np.asarray(output.tokens)
                return time.perf_counter() - start
            for part in full:
                cache = executor.read(part, cache)
            state, output = executor.extend(last, seen, controls, cache)
            np.asarray(output.tokens)
            seconds = time.perf_counter() - start
            cache = state.cache  # the parts say which slots count, so it needs no clearing
            return seconds

        return _warm(run)

    def decode(self, batch: int, context: int, count: int) -> Run:
        """Take `count` steps after `context` tokens, each started before the one before it is read.

        The seconds are those of one step. Keys and values of the context are zeros.
        """
        batch = self._filled(batch)
        size = bucket(context + max(count, ROOM), self.config.seq_length)
        controls, keep = self._controls(batch), np.ones(batch, bool)
        state = steps.State(
            self._executor.new_cache(batch, size),
            *self._executor.places.put(
                (
                    np.zeros(batch, np.int32),
                    np.zeros((batch, self.config.vocab_size), bool),
                    np.ones(batch, bool),
                    np.zeros(batch, np.int32),
                )
            ),
        )

        def run() -> float:
            nonlocal state
            state = jax.block_until_ready(_rewound(state, context))
            pending = None
            start = time.perf_counter()
            for _ in range(count):
                state, output = self._executor.decode(controls, keep, state)
                output.tokens.copy_to_host_async()
                if pending is not None:
                    np.asarray(pending)
                pending = output.tokens
            np.asarray(pending)
            return (time.perf_counter() - start) / count

        return _warm(run)

    def _filled(self, batch: int) -> int:
        """Return B for so many rows: as many on every device that shares them."""
        rows = self._executor.places.rows
        return -(-batch // rows) * rows

    def _controls(self, batch: int) -> steps.Controls:
        """Return controls for greedy decoding that never ends."""
        controls = steps.Controls(
            sampling=Sampling.of([SamplingParams(temperature=0.0)] * batch, batch),
            seed=np.zeros((batch, 2), np.uint32),
            row_ids=np.arange(batch, dtype=np.int32),
            limit=np.full(batch, 2**30, np.int32),
            stop_ids=np.zeros(0, np.int32),
            want_logprobs=np.zeros(batch, bool),
        )
        return self._executor.places.put(controls)


def devices_of(params: Any) -> list[Any]:
    """Return the devices that hold parameters."""
    return sorted(params["final_norm"].devices(), key=lambda device: device.id)


def _warm(run: Run) -> Run:
    """Return it after it ran once, which compiles."""
    run()
    return run


def _rewound(state: steps.State, context: int) -> steps.State:
    """Return the state before the first step; the cache stays where it is."""
    cache = state.cache
    assert cache is not None
    return state._replace(
        cache=KVCache(cache.k, cache.v, jnp.full_like(cache.length, context), cache.prefix),
        active=jnp.ones_like(state.active),
        step=jnp.zeros_like(state.step),
    )
