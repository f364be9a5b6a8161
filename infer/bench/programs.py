"""The engine's programs, compiled and ready to be timed: prefill, and decode steps after it.

B rows, T prompt length. On a mesh all arrays are placed as the engine places them; rows that fill
up a batch are computed like others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, KVCache
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.mesh import mesh_of
from glm2_jax.runtime.buckets import bucket
from glm2_jax.runtime.xla import cache_dtype
from infer.engine import steps
from infer.engine.params import SamplingParams
from infer.engine.parts import ROOM, Part, parts
from infer.engine.placement import Places
from infer.engine.programs import Programs
from infer.engine.sampling import Sampling

Run = Callable[[], float]  # does the work once and returns its seconds


class Workload:
    """What is timed of one model.

    Attributes:
        device: of the params; on a mesh one of its devices, which stands for all.
        programs: compiles, and counts the seconds of it.
    """

    def __init__(self, config: GLMConfig, params: Any):
        self.config, self.params = config, params
        self.device = devices_of(params)[0]
        self.places = Places(mesh_of(params))
        self.programs = Programs(self.device.platform, places=self.places)
        self.dtype = cache_dtype(self.device.platform, params["final_norm"].dtype)

    def prefill(self, batch: int, length: int) -> Run:
        """Prefill `batch` prompts of `length` tokens, and draw the first token of each answer."""
        batch = self._filled(batch)
        random = np.random.default_rng(0)
        prompts = random.integers(3, self.config.vocab_size, (batch, length)).tolist()
        longest = min(max(1, PREFILL_CHUNK // batch), self.config.seq_length)
        pieces = parts(prompts, 0, batch, longest)
        size = bucket(length + ROOM, self.config.seq_length)
        if len(pieces) > 1:
            return self._prefill_in_parts(pieces, size)
        args = self.params, pieces[0].tokens, pieces[0].lengths, self._controls(batch)
        function = partial(steps.prefill, self.config, size, dtype=self.dtype)

        def run() -> float:
            start = time.perf_counter()
            _, output = self.programs.call("prefill", (batch, length), function, *args)
            np.asarray(output.tokens)
            return time.perf_counter() - start

        return _warm(run)

    def _prefill_in_parts(self, pieces: list[Part], size: int) -> Run:
        *full, last = pieces
        batch, call = len(last.lengths), self.programs.call
        controls = self._controls(batch)
        cache = self._begin(partial(KVCache.zeros, self.config, batch, size, self.dtype))
        seen = np.zeros((batch, self.config.vocab_size), bool)
        read, extend = (partial(step, self.config) for step in (steps.read, steps.extend))

        def run() -> float:
            nonlocal cache
            start = time.perf_counter()
            for part in full:
                cache = call("read", size, read, self.params, *part, cache, donate=4)
            args = self.params, *last, seen, controls, cache
            state, output = call("extend", size, extend, *args, donate=6)
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
        state = self._begin(partial(_start, self.config, batch, size, self.dtype))
        decode = partial(steps.decode, self.config)

        def run() -> float:
            nonlocal state
            state = jax.block_until_ready(_rewound(state, context))
            pending = None
            start = time.perf_counter()
            for _ in range(count):
                args = self.params, controls, keep, state
                state, output = self.programs.call("decode", size, decode, *args, donate=3)
                output.tokens.copy_to_host_async()
                if pending is not None:
                    np.asarray(pending)
                pending = output.tokens
            np.asarray(pending)
            return (time.perf_counter() - start) / count

        return _warm(run)

    def _begin(self, make: Callable[[], Any]) -> Any:
        """Return what `make` does, where the programs take it; on a mesh every device makes its
        part."""
        if self.places.mesh is not None:
            return self.programs.call("begin", None, make)
        with jax.default_device(self.device):
            return make()

    def _filled(self, batch: int) -> int:
        """Return B for so many rows: as many on every device that shares them."""
        return -(-batch // self.places.rows) * self.places.rows

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
        return self.places.put(controls)


def devices_of(params: Any) -> list[Any]:
    """Return the devices that hold parameters."""
    return sorted(params["final_norm"].devices(), key=lambda device: device.id)


def _warm(run: Run) -> Run:
    """Return it after it ran once, which compiles."""
    run()
    return run


def _start(config: GLMConfig, batch: int, size: int, dtype: Any) -> steps.State:
    """Return the state before the first step, its cache of `size` slots in `dtype`."""
    return steps.State(
        cache=KVCache.zeros(config, batch, size, dtype),
        token=jnp.zeros(batch, jnp.int32),
        seen=jnp.zeros((batch, config.vocab_size), bool),
        active=jnp.ones(batch, bool),
        step=jnp.zeros(batch, jnp.int32),
    )


def _rewound(state: steps.State, context: int) -> steps.State:
    """Return the state before the first step; the cache stays where it is."""
    cache = state.cache
    assert cache is not None
    return state._replace(
        cache=KVCache(cache.k, cache.v, jnp.full_like(cache.length, context), cache.prefix),
        active=jnp.ones_like(state.active),
        step=jnp.zeros_like(state.step),
    )
