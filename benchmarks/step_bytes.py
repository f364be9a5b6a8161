"""Counts what a decode step of a 6B model reads and writes, as compiled for devices not at hand.

    python -m benchmarks.step_bytes --device v5e-1
    python -m benchmarks.step_bytes --device h200 --target-config FILE

No weights and no device are needed: the packages of the compiler are (libtpu; JAX's CUDA plugin,
and FILE, XLA's description of the GPU). The bound is what no step can avoid: all weights but the
embedding, the keys and values of every token, what is new in the cache, and the logits. Of a list
of layers programs of 2 and of 4 are compiled: a layer is half their difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Read when jax starts: it does not look for an accelerator, nor libtpu for a metadata server.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.traffic import Moved, traffic
from glm2_jax import PRESETS, GLMConfig, KVCache, last_logits
from glm2_jax.forms import Attention, Forms
from glm2_jax.runtime.devices import faster_layers
from infer.memory.cards import CARDS
from infer.memory.compiler import absent_device
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params, total_bytes

CONFIG = PRESETS["chatglm2-6b-32k"]
FEW, MORE = 2, 4  # layers of the programs that stand for a list


class Case(NamedTuple):
    """One step: rows, tokens of each in the cache, and how cache and weights are stored."""

    rows: int
    slots: int
    kv: str
    weights: str


class Counted(NamedTuple):
    """Bytes of a step of all layers."""

    bound: float
    read: float
    written: float


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row of a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", required=True, choices=("h200", "v5e-1", "v5p"))
    parser.add_argument("--target-config", type=Path, metavar="FILE")
    parser.add_argument("--rows", default="1,8,64", metavar="N,N")
    parser.add_argument("--slots", default="2048,8192,32768", metavar="N,N")
    parser.add_argument("--kv", default="bfloat16,int8", metavar="KIND,KIND")
    parser.add_argument("--weights", default="bfloat16", metavar="KIND,KIND", help="or int8, int4")
    parser.add_argument("--layers", choices=("stacked", "list"), help="default: the faster")
    parser.add_argument("--attention", metavar="FORM", help="instead of the usual one")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="the N largest movers")
    args = parser.parse_args(argv)
    card, device = CARDS[args.device], find(args.device, args.target_config)
    print("| rows | tokens each | cache | weights | bound, GB | read | written | times the bound |")
    print("|---|---|---|---|---|---|---|---|")
    numbers = ([int(text) for text in given.split(",")] for given in (args.rows, args.slots))
    kinds = (given.split(",") for given in (args.kv, args.weights))
    for case in itertools.starmap(Case, itertools.product(*numbers, *kinds)):
        usual = faster_layers(card.platform, rows=case.rows, slots=case.slots)
        try:
            found, movers = count(case, device, args.layers or usual, args.attention)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(_row(*case, "does not fit", "", "", ""), flush=True)
            continue
        print(_line(case, found), flush=True)
        for one in movers[: args.show]:
            print(f"    {one.read / 1e6:9.1f} {one.written / 1e6:9.1f} MB, "
                  f"{one.times} x {one.opcode} {one.name} {_source(one)}")  # fmt: skip


def find(name: str, target_config: Path | None) -> Any:
    """Return a device of that name to compile for."""
    card = CARDS[name]
    if card.topology is not None:
        return absent_device(card.topology, card.platform)
    if target_config is None:
        raise SystemExit("--device h200 needs --target-config FILE")
    return topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology="1x1x1",
        target_config=target_config.read_text(),
    ).devices[0]  # fmt: skip


def count(
    case: Case, device: Any, layers: str, attention: str | None
) -> tuple[Counted, list[Moved]]:
    """Count the bytes of a step of all layers, and list what moves most in a compiled program."""
    if layers == "stacked":
        return _counted(case, device, layers, attention, CONFIG.num_layers)
    few, _ = _counted(case, device, layers, attention, FEW)
    more, movers = _counted(case, device, layers, attention, MORE)
    each = (CONFIG.num_layers - FEW) / (MORE - FEW)
    return Counted(*(a + (b - a) * each for a, b in zip(few, more, strict=True))), movers


def _counted(
    case: Case, device: Any, layers: str, attention: str | None, number: int
) -> tuple[Counted, list[Moved]]:
    forms = Forms(attention=((Attention(1, case.slots), attention),)) if attention else Forms()
    config = dataclasses.replace(CONFIG, num_layers=number, forms=forms)
    params, cache = shapes(config, case, layers)
    program = _compiled(config, params, cache, case.rows, device)
    moved = traffic(program.as_text())
    read, written = sum(one.read for one in moved), sum(one.written for one in moved)
    found = Counted(bound(config, params, cache, case), read, written)
    return found, sorted(moved, key=lambda one: -one.bytes)


def shapes(config: GLMConfig, case: Case, layers: str) -> tuple[Any, KVCache]:
    """Return the shapes of the parameters and of the cache."""
    scheme = None if case.weights == "bfloat16" else case.weights
    params = abstract_params(config, Precision("bfloat16", scheme), stacked=layers == "stacked")
    return params, jax.eval_shape(lambda: KVCache.zeros(config, *case[:2], jnp.dtype(case.kv)))


def _compiled(config: GLMConfig, params: Any, cache: KVCache, rows: int, device: Any) -> Any:
    def step(params: Any, tokens: jax.Array, cache: KVCache) -> Any:
        return last_logits(config, params, tokens, jnp.zeros(rows, jnp.int32), cache=cache)

    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    place = SingleDeviceSharding(device)
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (params, tokens, cache)
    )
    # Without a GPU nothing can be timed while compiling.
    options: Any = {"xla_gpu_autotune_level": 0} if device.platform != "tpu" else {}
    lowered = jax.jit(step, donate_argnums=2).lower(*args)
    return lowered.compile(compiler_options=options)


def bound(config: GLMConfig, params: Any, cache: KVCache, case: Case) -> float:
    """Return the bytes that a step has to move."""
    stored = total_bytes((cache.k, cache.v))
    read = total_bytes({name: x for name, x in params.items() if name != "embed"})
    read += case.rows * total_bytes(params["embed"]) / config.vocab_size
    return read + stored + stored / case.slots + case.rows * config.vocab_size * 4


def _line(case: Case, found: Counted) -> str:
    numbers = [f"{number / 1e9:.2f}" for number in found]
    return _row(*case, *numbers, f"{(found.read + found.written) / found.bound:.2f}")


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _source(one: Moved) -> str:
    """Return where an instruction comes from."""
    return one.line.partition('op_name="')[2].partition('"')[0]


if __name__ == "__main__":
    main()
