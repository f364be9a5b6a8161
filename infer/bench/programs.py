"""What is timed: the engine's prefill, and its decode steps, and the least that they have to do.

On a mesh all arrays are placed as the engine places them; rows that fill up a batch are computed
like others.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig
from glm2_jax.limits import PREFILL_CHUNK
from glm2_jax.parts import tables_of
from glm2_jax.runtime.buckets import bucket
from glm2_jax.schemes import COLUMN_AXES
from infer.engine import steps
from infer.engine.call import ROOM, parts
from infer.engine.executor import Executor
from infer.engine.params import SamplingParams
from infer.engine.sampling import Sampling
from infer.memory.precision import Precision, vector_bytes
from infer.memory.shares import (
    Sizes,
    computed_params,
    count_devices,
    row_pieces,
    sizes_of,
    total_bytes,
)

Run = Callable[[], float]  # does the work once and returns its seconds


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is measured."""

    batch: int
    prompt: int = 0  # tokens of each row that are prefilled; 0 = a decode step is measured
    context: int = 0  # tokens of each row in the cache before the first step
    steps: int = 1  # of one repetition

    @property
    def name(self) -> str:
        """ "prefill 1 x 512", "decode 8 at 2048": rows, and tokens read or in the cache."""
        if self.prompt:
            return f"prefill {self.batch} x {self.prompt}"
        return f"decode {self.batch} at {self.context}"

    @property
    def tokens(self) -> int:
        """Tokens of a prefill or of one step, all rows together."""
        return self.batch * max(self.prompt, 1)

    @property
    def length(self) -> int:
        """The longest a row becomes."""
        return self.prompt or self.context + self.steps


def work(
    config: GLMConfig,
    precision: Precision,
    shape: Shape,
    platform: str,
    mesh: Sizes | None = None,
    kv: str = "auto",
) -> tuple[float, float]:
    """Return the least that a prefill, or a step on average, has to do on all devices together.

    That is what one device does, times their number: arrays that several devices hold count on each
    of them, and so do rows that fill up a batch. Weights that `fsdp` cuts count in full, as what is
    gathered is read. Collectives are not counted.

    Returns:
        Bytes: every weight once, but of the embedding only the rows of the tokens, and likewise of
        other tables; keys and values
        of the tokens that are attended to, once a row. Not what a larger cache may make it read.
        Operations: two for each number of a matrix and token (the head: for each row), and four for
        each pair of a query and a key, head and dimension.
    """
    mesh = mesh or sizes_of({})
    params = computed_params(config, precision, mesh)
    layers, dtype = params["layers"], params["final_norm"].dtype
    rows = -(-shape.batch // row_pieces(mesh))
    tokens = rows * max(shape.prompt, 1)
    seen = shape.prompt or shape.context + (shape.steps + 1) / 2  # keys that a row ends up with
    pairs = shape.prompt * (shape.prompt + 1) / 2 if shape.prompt else seen
    tables, D = tables_of(config), config.hidden_size
    moved = total_bytes(params) - sum(total_bytes(params[name]) for name in tables)
    moved += len(tables) * tokens * D * dtype.itemsize
    kept = vector_bytes(config.head_dim, precision.cache_size(platform, kv)) / config.head_dim
    queries, keys, values = (layers[name].size // D for name in "qkv")  # of a token, all layers
    moved += rows * seen * (keys + values) * kept
    flops = 2 * sum(layers[name].size for name in COLUMN_AXES) * tokens
    flops += 2 * params[config.block.head].size * rows + 4 * queries * pairs * rows
    devices = count_devices(mesh)
    return devices * moved, devices * flops


class Workload:
    """What is timed of one model; `programs` compiles, and counts the seconds of it. An executor
    of the model may be given, to share its programs."""

    def __init__(
        self, config: GLMConfig, params: Any, kv: str = "auto", executor: Executor | None = None
    ):
        self.config, self._executor = config, executor or Executor(config, params, kv=kv)
        self.programs = self._executor.programs

    def prefill(self, shape: Shape) -> Run:
        """Prefill prompts, and draw the first token of each answer."""
        batch, executor = self._filled(shape.batch), self._executor
        random = np.random.default_rng(0)
        prompts = random.integers(3, self.config.vocab_size, (batch, shape.prompt)).tolist()
        longest = min(max(1, PREFILL_CHUNK // batch), self.config.seq_length)
        if self.config.block.bidirectional:  # its tokens see each other
            longest = shape.prompt
        *full, last = parts(prompts, 0, batch, longest)
        size = bucket(shape.prompt + ROOM, self.config.seq_length)
        controls = self._controls(batch)
        cache = executor.new_cache(batch, size) if full else None
        counts = np.zeros((batch, self.config.vocab_size), np.int16)

        def run() -> float:
            nonlocal cache
            start = time.perf_counter()
            if cache is None:
                _, output = executor.prefill(last, size, counts, controls)
                np.asarray(output.tokens)
                return time.perf_counter() - start
            for part in full:
                cache = executor.read(part, cache)
            state, output = executor.extend(last, counts, controls, cache)
            np.asarray(output.tokens)
            seconds = time.perf_counter() - start
            cache = state.cache  # the parts say which slots count, so it needs no clearing
            return seconds

        run()  # compiles
        return run

    def decode(self, shape: Shape) -> Run:
        """Take steps after a context, each started before the one before it is read.

        The seconds are those of one step. Keys and values of the context are zeros.
        """
        batch, size = self._filled(shape.batch), self._slots(shape)
        controls, keep = self._controls(batch), np.ones(batch, bool)
        rest = (
            np.zeros(batch, np.int32),
            np.zeros((batch, self.config.vocab_size), np.int16),
            np.ones(batch, bool),
            np.zeros(batch, np.int32),
        )
        cache = self._executor.new_cache(batch, size)
        state = steps.State(cache, *self._executor.places.put(rest))

        def run() -> float:
            nonlocal state
            state = jax.block_until_ready(_rewound(state, shape.context))
            pending = None
            start = time.perf_counter()
            for _ in range(shape.steps):
                drafts = None
                if self.config.idea.drafts:
                    state, drafts = self._executor.draft(keep, state)
                state, output = self._executor.decode(controls, keep, state, drafts=drafts)
                output.tokens.copy_to_host_async()
                if pending is not None:
                    np.asarray(pending)
                pending = output.tokens
            np.asarray(pending)
            return (time.perf_counter() - start) / shape.steps

        run()  # compiles
        return run

    def moved(self, shape: Shape) -> float | None:
        """Return the bytes that the programs of a step move, those that draw left out, as the
        compiler counts them; None where it does not. After `decode`."""
        at, drafts = (self._filled(shape.batch), self._slots(shape)), self.config.idea.drafts
        keys = {"draft": at, "verify": (*at, drafts)} if drafts else {"decode": at}
        found = [self.programs.bytes_accessed(name, key) for name, key in keys.items()]
        return None if None in found else sum(one for one in found if one is not None)

    def _slots(self, shape: Shape) -> int:
        """Return the slots of the cache that steps are taken with."""
        return bucket(shape.context + max(shape.steps, ROOM), self.config.seq_length)

    def _filled(self, batch: int) -> int:
        """Return the rows that are computed: as many on every device that shares them."""
        rows = self._executor.places.rows
        return -(-batch // rows) * rows

    def _controls(self, batch: int) -> steps.Controls:
        """Return controls for greedy decoding that never ends."""
        controls = steps.Controls(
            sampling=Sampling.of([SamplingParams(temperature=0.0)] * batch),
            seed=np.zeros((batch, 2), np.uint32),
            row_ids=np.arange(batch, dtype=np.int32),
            limit=np.full(batch, 2**30, np.int32),
            stop_ids=np.full((batch, steps.STOP_IDS), -1, np.int32),
            want_logprobs=np.zeros(batch, bool),
        )
        return self._executor.places.put(controls)


def _rewound(state: steps.State, context: int) -> steps.State:
    """Return the state before the first step; the cache stays where it is."""
    cache = state.cache
    assert cache is not None
    return state._replace(
        cache=dataclasses.replace(cache, length=jnp.full_like(cache.length, context)),
        active=jnp.ones_like(state.active),
        step=jnp.zeros_like(state.step),
    )
