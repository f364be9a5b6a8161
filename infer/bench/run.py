"""Measuring a model shape by shape, and the peer in turns with it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from convert.cli import is_out_of_memory
from glm2_jax import GLMConfig
from glm2_jax.schemes import COLUMN_AXES
from glm2_jax.xla import cache_dtype
from infer.bench.peer import Peer, PeerError
from infer.bench.programs import Compiler, decode, prefill
from infer.memory.peak import peak_bytes, reset_peak


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
      compile_s: compiling the programs.
      planned: bytes of device memory that the compiler says they need, weights included.
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
    dtype = params["final_norm"].dtype
    kept = np.dtype(cache_dtype(device_of(params).platform, dtype))
    per_token = c.num_layers * 2 * c.num_kv_heads * c.head_dim * kept.itemsize
    layers = params["layers"]
    matrices = sum(
        weight.size
        for layer in (layers if isinstance(layers, list) else [layers])
        for name, weight in layer.items()
        if name in COLUMN_AXES
    )
    moved = weights + shape.tokens * c.hidden_size * dtype.itemsize
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
        reset_peak()
        try:
            _measure(config, params, result, repeats, peer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            result.problem = "out of memory"
        result.peak = peak_bytes(device_of(params))
        yield result


def _measure(
    config: GLMConfig, params: Any, result: Result, repeats: int, peer: Peer | None
) -> None:
    shape = result.shape
    programs = Compiler(device_of(params))
    if shape.prompt:
        run = prefill(programs, config, params, shape.batch, shape.prompt)
    else:
        run = decode(programs, config, params, shape.batch, shape.context, shape.steps)
    result.compile_s, result.planned = programs.seconds, programs.planned
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


def device_of(params: Any) -> Any:
    """Where parameters are."""
    return next(iter(params["final_norm"].devices()))
