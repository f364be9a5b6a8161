"""Measuring: programs of the engine, shape by shape, the peer's in between.

B rows, T prompt length, S cache slots.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, KVCache, compiler_options
from glm2_jax.schemes import COLUMN_AXES
from infer import steps
from infer.bench_peer import Peer, PeerError
from infer.job import bucket
from infer.params import SamplingParams
from infer.programs import device_errors
from infer.sampling import Rows, seed_words


@dataclass(frozen=True)
class Shape:
    """What is measured.

    Attributes:
      batch: rows.
      prompt: tokens of each row that are read; 0 = a step is measured.
      context: tokens of each row that are in the cache before the first step.
      steps: of one repetition.
    """

    batch: int
    prompt: int = 0
    context: int = 0
    steps: int = 1

    @property
    def kind(self) -> str:
        return "prefill" if self.prompt else "decode"

    @property
    def tokens(self) -> int:
        """Tokens of a prefill or of one step, all rows together."""
        return self.batch * max(self.prompt, 1)

    @property
    def length(self) -> int:
        """The longest a row becomes."""
        return self.prompt or self.context + self.steps


@dataclass(frozen=True)
class Variant:
    """A model in memory.

    Attributes:
      dtype: name of the type that it computes in.
      quantisation: name of the scheme of the layers' matrices; "none".
      layers: "list" or "stacked".
      weights: bytes of all parameters.
    """

    dtype: str
    quantisation: str
    layers: str
    weights: int = 0


@dataclass
class Result:
    """What came out of one shape.

    Attributes:
      bytes, flops: that a prefill or a step cannot do without, see `work`.
      seconds: of a prefill or a step, one for each repetition.
      compile_s: compiling the program.
      planned: bytes of device memory that the compiler says the program needs, weights included.
      peak: the most memory used; on a CPU since the measurement began, elsewhere since the start.
      peers: the peer's seconds by mode.
      problem: why there are no seconds, or none of the peer's; "".
    """

    variant: Variant
    shape: Shape
    bytes: float = 0.0
    flops: float = 0.0
    seconds: list[float] = field(default_factory=list)
    compile_s: float = 0.0
    planned: int | None = None
    peak: int | None = None
    peers: dict[str, list[float]] = field(default_factory=dict)
    problem: str = ""

    def per_second(self, amount: float) -> float:
        """`amount`, if that is what a prefill or a step does, in the best repetition."""
        return amount / min(self.seconds)

    @property
    def rate(self) -> float:
        """Tokens per second of the best repetition."""
        return self.per_second(self.shape.tokens)

    @property
    def median_rate(self) -> float:
        """Tokens per second of the median repetition."""
        return self.shape.tokens / statistics.median(self.seconds)

    def ratio(self, mode: str) -> float:
        """How many times as fast as the peer: the best against the best."""
        return min(self.peers[mode]) / min(self.seconds)


def work(config: GLMConfig, params: Any, shape: Shape) -> tuple[float, float]:
    """What a prefill, or a step on average, cannot do without.

    Returns:
      Bytes: every weight once, but of the embedding only the rows of the tokens; keys and values
      of the tokens that are looked at, once a row. Not what a larger cache may make it read.
      Operations: two for each number of a matrix and token (the head: for each row), and four for
      each pair of a query and a key, head and dimension.
    """
    c, head, embed = config, params["head"], params["embed"]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - embed.nbytes
    seen = shape.prompt or shape.context + (shape.steps + 1) / 2  # keys that a row ends up with
    pairs = shape.prompt * (shape.prompt + 1) / 2 if shape.prompt else seen
    per_token = c.num_layers * 2 * c.num_kv_heads * c.head_dim * embed.dtype.itemsize
    layers = params["layers"]
    matrices = sum(
        weight.size
        for layer in (layers if isinstance(layers, list) else [layers])
        for name, weight in layer.items()
        if name in COLUMN_AXES
    )
    moved = weights + shape.tokens * c.hidden_size * embed.dtype.itemsize
    flops = 2 * (matrices * shape.tokens + head.size * shape.batch)
    attention = 4 * c.num_layers * c.num_heads * c.head_dim * pairs * shape.batch
    return moved + shape.batch * seen * per_token, flops + attention


def measure_all(
    config: GLMConfig,
    params: Any,
    variant: Variant,
    shapes: Iterable[Shape],
    *,
    repeats: int,
    peer: Peer | None = None,
) -> Iterator[Result]:
    """Measures one model; ours and the peer's repetitions take turns, so that noise hits both.

    Args:
      peer: with a model of the same dtype open.
    """
    for shape in shapes:
        result = Result(variant, shape, *work(config, params, shape))
        _reset_peak()
        try:
            with device_errors(f"{shape}"):
                _measure(config, params, result, repeats, peer)
        except Exception as error:
            if "out of device memory" not in str(error):
                raise
            result.problem = "out of memory"
        result.peak = peak_bytes(_device(params))
        yield result


def _measure(
    config: GLMConfig, params: Any, result: Result, repeats: int, peer: Peer | None
) -> None:
    shape = result.shape
    run = (_prefill if shape.prompt else _decode)(config, params, result)
    run()
    for mode in peer.modes if peer else ():
        assert peer is not None
        try:
            peer.prepare(mode, shape.batch, shape.prompt, shape.context, shape.steps)
            for _ in range(repeats):
                result.seconds.append(run())
                result.peers.setdefault(mode, []).append(peer.measure())
        except PeerError as error:
            result.peers.pop(mode, None)
            result.problem = str(error)
    for _ in range(repeats - len(result.seconds)):
        result.seconds.append(run())


def _prefill(config: GLMConfig, params: Any, result: Result) -> Callable[[], float]:
    """Compiles; returns what does it once and tells the seconds."""
    shape = result.shape
    size = bucket(shape.length, config.seq_length)
    random = np.random.default_rng(0)
    tokens = random.integers(3, config.vocab_size, (shape.batch, shape.prompt), np.int32)
    lengths = np.full(shape.batch, shape.prompt, np.int32)
    args = params, tokens, lengths, _controls(shape)
    program = _compiled(result, partial(steps.prefill, config, size), *args)

    def run() -> float:
        start = time.perf_counter()
        _, output = program(*args)
        np.asarray(output.tokens)
        return time.perf_counter() - start

    return run


def _decode(config: GLMConfig, params: Any, result: Result) -> Callable[[], float]:
    """The same for a step, as the engine does it: the next one starts before this one is read."""
    shape, controls = result.shape, _controls(result.shape)
    with jax.default_device(_device(params)):
        state = _state(config, shape, params["embed"].dtype)
    keep = np.ones(shape.batch, bool)
    program = _compiled(
        result, partial(steps.decode, config), params, controls, keep, state, donate=3
    )

    def run() -> float:
        nonlocal state
        state = jax.block_until_ready(_rewound(state, shape))
        start = time.perf_counter()
        pending = None
        for _ in range(shape.steps):
            state, output = program(params, controls, keep, state)
            output.tokens.copy_to_host_async()
            if pending is not None:
                np.asarray(pending)
            pending = output.tokens
        np.asarray(pending)
        return (time.perf_counter() - start) / shape.steps

    return run


def _controls(shape: Shape) -> steps.Controls:
    """Greedy, and never at an end."""
    return steps.Controls(
        rows=Rows.full(shape.batch, SamplingParams(temperature=0.0)),
        seed=seed_words(0),
        row_ids=np.arange(shape.batch, dtype=np.int32),
        limit=np.full(shape.batch, 2**30, np.int32),
        stop_ids=np.zeros(0, np.int32),
        want_logprobs=np.array(False),
    )


def _state(config: GLMConfig, shape: Shape, dtype: Any) -> steps.State:
    """As after a prompt of `context` tokens, whose keys and values are zeros."""
    cache = KVCache.zeros(config, shape.batch, bucket(shape.length, config.seq_length), dtype)
    return steps.State(
        cache=cache,
        token=jnp.zeros(shape.batch, jnp.int32),
        seen=jnp.zeros((shape.batch, config.vocab_size), bool),
        active=jnp.ones(shape.batch, bool),
        step=jnp.int32(0),
    )


def _rewound(state: steps.State, shape: Shape) -> steps.State:
    """The state before the first step; the cache stays where it is."""
    cache = state.cache
    assert cache is not None
    length = jnp.full_like(cache.length, shape.context)
    return state._replace(
        cache=KVCache(cache.k, cache.v, length, cache.prefix),
        active=jnp.ones_like(state.active),
        step=jnp.zeros_like(state.step),
    )


def _compiled(result: Result, function: Callable, *args: Any, donate: int | None = None) -> Any:
    """The engine's program for these arguments; notes how long it took and what it needs."""
    options = compiler_options(_device(args[0]).platform)
    start = time.perf_counter()
    donated = () if donate is None else (donate,)
    jitted = jax.jit(function, donate_argnums=donated, compiler_options=options)
    program = jitted.lower(*args).compile()
    result.compile_s = time.perf_counter() - start
    memory = program.memory_analysis()
    if memory is not None:
        result.planned = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return program


def _device(params: Any) -> Any:
    return next(iter(params["embed"].devices()))


def _reset_peak() -> None:
    """Linux can begin anew; elsewhere the peak is since the start."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_bytes(device: Any) -> int | None:
    """The most memory used so far, on the device where it tells, else of this process."""
    found = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if found is not None:
        return found
    if device.platform != "cpu":
        return None
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
