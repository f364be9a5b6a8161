"""Measures a model shape by shape, and the peer in turns with it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from glm2_jax import GLMConfig
from glm2_jax.cli.main import is_out_of_memory
from glm2_jax.mesh import mesh_of
from glm2_jax.runtime.xla import cache_dtype
from glm2_jax.schemes import COLUMN_AXES
from infer.bench.peer import Peer, PeerError
from infer.bench.programs import Workload, devices_of
from infer.memory.peak import peak_bytes, reset_peak
from infer.memory.precision import Precision
from infer.memory.shares import (
    Sizes,
    count_devices,
    device_params,
    row_pieces,
    sizes_of,
    total_bytes,
)


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    batch: int
    prompt: int = 0  # tokens of each row that are prefilled; 0 = a decode step is measured
    context: int = 0  # tokens of each row in the cache before the first step
    steps: int = 1  # of one repetition

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
    """A model in memory."""

    dtype: str
    quantization: str  # the scheme of the layers' matrices, or "none"
    layers: str  # "list" or "stacked"
    weights: int = 0  # bytes of all parameters, once

    @property
    def precision(self) -> Precision:
        """The same for `infer.memory`."""
        return Precision(self.dtype, None if self.quantization == "none" else self.quantization)


@dataclass
class Result:
    """The measurement of one shape.

    `peak` is the most memory used: on a CPU by the process since the measurement began, elsewhere
    since the start, on the device that used most.
    """

    variant: Variant
    shape: Shape
    bytes: float = 0.0  # the least that a prefill or a step has to do, see `work`
    flops: float = 0.0
    seconds: list[float] = field(default_factory=list)  # of one, for each repetition
    compile_s: float = 0.0
    peak: int | None = None
    peers: dict[str, list[float]] = field(default_factory=dict)  # the peer's seconds by mode
    problem: str = ""  # why there are no seconds, or none of the peer's

    def per_second(self, amount: float) -> float:
        """Return an amount of one prefill or step per second of the best repetition."""
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
        """Return how many times as fast as the peer: the best compared with the best."""
        return min(self.peers[mode]) / min(self.seconds)


def work(
    config: GLMConfig, precision: Precision, shape: Shape, platform: str, mesh: Sizes | None = None
) -> tuple[float, float]:
    """Return the least that a prefill, or a step on average, has to do on all devices together.

    That is what one device does, times their number: arrays that several devices hold count on each
    of them, and so do rows that fill up a batch. Weights that `fsdp` cuts count in full, as what is
    gathered is read. Collectives are not counted.

    Returns:
        Bytes: every weight once, but of the embedding only the rows of the tokens; keys and values
        of the tokens that are attended to, once a row. Not what a larger cache may make it read.
        Operations: two for each number of a matrix and token (the head: for each row), and four for
        each pair of a query and a key, head and dimension.
    """
    mesh = mesh or sizes_of({})
    params = device_params(config, precision, sizes_of({**dict(mesh), "data": 1, "fsdp": 1}))
    layers, dtype = params["layers"], params["final_norm"].dtype
    rows = -(-shape.batch // row_pieces(mesh))
    tokens = rows * max(shape.prompt, 1)
    seen = shape.prompt or shape.context + (shape.steps + 1) / 2  # keys that a row ends up with
    pairs = shape.prompt * (shape.prompt + 1) / 2 if shape.prompt else seen
    moved = total_bytes(params) - total_bytes(params["embed"])
    moved += tokens * config.hidden_size * dtype.itemsize
    # The biases are as long as the queries, keys and values of a token.
    kept = np.dtype(cache_dtype(platform, dtype)).itemsize
    moved += rows * seen * (layers["k_bias"].size + layers["v_bias"].size) * kept
    flops = 2 * sum(layers[name].size for name in COLUMN_AXES) * tokens
    flops += 2 * params["head"].size * rows + 4 * layers["q_bias"].size * pairs * rows
    devices = count_devices(mesh)
    return devices * moved, devices * flops


def measure_all(
    config: GLMConfig,
    params: Any,
    variant: Variant,
    shapes: Iterable[Shape],
    *,
    repeats: int,
    peer: Peer | None = None,
) -> Iterator[Result]:
    """Measure one model; our repetitions and the peer's take turns, so that noise affects both.

    Args:
        peer: with a model of the same dtype open.
    """
    for shape in shapes:
        devices, mesh = devices_of(params), mesh_of(params)
        sizes = None if mesh is None else sizes_of(mesh.shape)
        least = work(config, variant.precision, shape, devices[0].platform, sizes)
        result = Result(variant, shape, *least)
        reset_peak()
        try:
            _measure(config, params, result, repeats, peer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            result.problem = "out of memory"
        peaks = [peak for peak in map(peak_bytes, devices) if peak is not None]
        result.peak = max(peaks, default=None)
        yield result


def _measure(
    config: GLMConfig, params: Any, result: Result, repeats: int, peer: Peer | None
) -> None:
    shape, work = result.shape, Workload(config, params)
    if shape.prompt:
        run = work.prefill(shape.batch, shape.prompt)
    else:
        run = work.decode(shape.batch, shape.context, shape.steps)
    result.compile_s = work.programs.seconds
    for mode in peer.modes if peer else ():
        assert peer is not None
        try:
            peer.ask(do="prepare", mode=mode, **asdict(shape))
            for _ in range(repeats):
                result.seconds.append(run())
                result.peers.setdefault(mode, []).append(peer.measure())
        except PeerError as error:
            result.peers.pop(mode, None)
            result.problem = str(error)
    for _ in range(repeats - len(result.seconds)):
        result.seconds.append(run())
