"""The engine's programs, compiled and ready to be timed: reading prompts, and steps after them.

B rows, T prompt length. What `prefill` and `decode` return does it once and tells the seconds. On a
mesh everything lies where the engine has it; rows that fill up a batch are computed like others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, KVCache, compiler_options
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.runtime.buckets import bucket
from glm2_jax.runtime.xla import cache_dtype
from infer.engine import steps
from infer.engine.params import SamplingParams
from infer.engine.parts import ROOM, Part, parts
from infer.engine.placement import Places
from infer.engine.sampling import Sampling

Run = Callable[[], float]


class Compiler:
    """Compiles for a device, or for a mesh.

    Attributes:
      device: on a mesh one of its devices, which stands for all.
      places: where arrays lie.
      seconds: that it took so far.
      planned: bytes of memory that the largest program needs on each device, by the compiler's
        account; None where it gives none.
    """

    def __init__(self, device: Any, places: Places | None = None):
        self.device, self.places = device, places or Places()
        self.seconds = 0.0
        self.planned: int | None = None

    def __call__(self, function: Callable, *args: Any, donate: int | None = None) -> Any:
        """The program for these arguments, as `infer.engine.programs` makes it."""
        start = time.perf_counter()
        traced = self.places.trace(function, args, donate)
        with self.places.active():
            options = compiler_options(self.device.platform)
            program = traced.lower().compile(compiler_options=options)
        self.seconds += time.perf_counter() - start
        memory = program.memory_analysis()
        if memory is not None:
            needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
            needed += memory.temp_size_in_bytes - memory.alias_size_in_bytes
            self.planned = max(needed, self.planned or 0)
        return program

    def begin(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, where the programs take it; on a mesh never whole on a device."""
        if self.places.mesh is not None:
            return self(make)()
        with jax.default_device(self.device):
            return make()

    def filled(self, batch: int) -> int:
        """B for so many rows: as many on every device that shares them."""
        return -(-batch // self.places.rows) * self.places.rows


def prefill(compiler: Compiler, config: GLMConfig, params: Any, batch: int, length: int) -> Run:
    """Reading `batch` prompts of `length` tokens, and drawing the first token of each answer."""
    batch = compiler.filled(batch)
    random = np.random.default_rng(0)
    prompts = random.integers(3, config.vocab_size, (batch, length)).tolist()
    longest = min(max(1, PREFILL_CHUNK // batch), config.seq_length)
    pieces = parts(prompts, 0, batch, longest)
    size = bucket(length + ROOM, config.seq_length)
    if len(pieces) > 1:
        return _prefill_in_parts(compiler, config, params, pieces, size)
    args = params, pieces[0].tokens, pieces[0].lengths, _controls(compiler, batch)
    dtype = _cache_dtype(compiler, params)
    program = compiler(partial(steps.prefill, config, size, dtype=dtype), *args)

    def run() -> float:
        start = time.perf_counter()
        _, output = program(*args)
        np.asarray(output.tokens)
        return time.perf_counter() - start

    return run


def _prefill_in_parts(
    compiler: Compiler, config: GLMConfig, params: Any, pieces: list[Part], size: int
) -> Run:
    *full, last = pieces
    batch = len(last.lengths)
    kind, controls = _cache_dtype(compiler, params), _controls(compiler, batch)
    cache = compiler.begin(partial(KVCache.zeros, config, batch, size, kind))
    seen = np.zeros((batch, config.vocab_size), bool)
    read = compiler(partial(steps.read, config), params, *full[0], cache, donate=4)
    extend = compiler(partial(steps.extend, config), params, *last, seen, controls, cache, donate=6)

    def run() -> float:
        nonlocal cache
        start = time.perf_counter()
        for part in full:
            cache = read(params, *part, cache)
        state, output = extend(params, *last, seen, controls, cache)
        np.asarray(output.tokens)
        seconds = time.perf_counter() - start
        cache = state.cache  # the parts say which slots count, so it needs no cleaning
        return seconds

    return run


def decode(
    compiler: Compiler, config: GLMConfig, params: Any, batch: int, context: int, count: int
) -> Run:
    """`count` steps after `context` tokens, each started before the one before it is read.

    The seconds are those of one step. Keys and values of the context are zeros.
    """
    batch = compiler.filled(batch)
    size = bucket(context + max(count, ROOM), config.seq_length)
    controls, keep = _controls(compiler, batch), np.ones(batch, bool)
    state = compiler.begin(partial(_start, config, batch, size, _cache_dtype(compiler, params)))
    program = compiler(partial(steps.decode, config), params, controls, keep, state, donate=3)

    def run() -> float:
        nonlocal state
        state = jax.block_until_ready(_rewound(state, context))
        pending = None
        start = time.perf_counter()
        for _ in range(count):
            state, output = program(params, controls, keep, state)
            output.tokens.copy_to_host_async()
            if pending is not None:
                np.asarray(pending)
            pending = output.tokens
        np.asarray(pending)
        return (time.perf_counter() - start) / count

    return run


def _controls(compiler: Compiler, batch: int) -> steps.Controls:
    """Greedy, and never at an end."""
    controls = steps.Controls(
        sampling=Sampling.of([SamplingParams(temperature=0.0)] * batch, batch),
        seed=np.zeros((batch, 2), np.uint32),
        row_ids=np.arange(batch, dtype=np.int32),
        limit=np.full(batch, 2**30, np.int32),
        stop_ids=np.zeros(0, np.int32),
        want_logprobs=np.zeros(batch, bool),
    )
    return compiler.places.put(controls)


def _start(config: GLMConfig, batch: int, size: int, dtype: Any) -> steps.State:
    """The state before the first step, its cache of `size` slots in `dtype`."""
    return steps.State(
        cache=KVCache.zeros(config, batch, size, dtype),
        token=jnp.zeros(batch, jnp.int32),
        seen=jnp.zeros((batch, config.vocab_size), bool),
        active=jnp.ones(batch, bool),
        step=jnp.zeros(batch, jnp.int32),
    )


def _cache_dtype(compiler: Compiler, params: Any) -> Any:
    return cache_dtype(compiler.device.platform, params["final_norm"].dtype)


def _rewound(state: steps.State, context: int) -> steps.State:
    """The state before the first step; the cache stays where it is."""
    cache = state.cache
    assert cache is not None
    return state._replace(
        cache=KVCache(cache.k, cache.v, jnp.full_like(cache.length, context), cache.prefix),
        active=jnp.ones_like(state.active),
        step=jnp.zeros_like(state.step),
    )
