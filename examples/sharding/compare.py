"""Compares what one layer compiles to with pmap, jit and shard_map.

    python examples/sharding/compare.py [--json]

Without other devices, or with JAX_PLATFORMS=cpu, it computes on eight virtual ones of the CPU.
Their times do not predict those of real devices: all eight share the same cores and memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax

if __name__ == "__main__":  # before jax looks for devices; only affects the CPU
    jax.config.update("jax_num_cpu_devices", 8)

import numpy as np
from layer import Way, example, layer, loss, ways
from program import collectives

HEADER = ("way", "mesh", "forward", "gradient", "KB", "ms")


def measure(way: Way) -> dict[str, Any]:
    """Return one line of the table.

    Raises:
        AssertionError: the results are not those of a single device.
    """
    given = way.weights, way.x
    forward, gradient = (f.lower(*given).compile() for f in (way.forward, way.gradient))
    check(forward(*given), gradient(*given))
    found = collectives(forward.as_text()), collectives(gradient.as_text())
    return {
        "way": way.name,
        "mesh": way.mesh,
        "forward": counted(found[0]),
        "gradient": counted(found[1]),
        "KB": f"{sum(size for one in found for _, size in one) / 1024:.0f}",
        "ms": f"{1e3 * seconds(lambda: forward(*given)):.2f}",
    }


@functools.cache
def wanted() -> tuple[Any, Any]:
    """Return output and gradients of one device."""
    weights, x = example()
    return jax.jit(layer)(weights, x), jax.jit(jax.grad(loss))(weights, x)


def check(out: Any, gradients: Any) -> None:
    want, want_gradients = wanted()
    np.testing.assert_allclose(np.asarray(out).reshape(want.shape), want, atol=1e-5)
    for name, array in want_gradients.items():  # pmap has one for each device
        got = np.asarray(gradients[name]).reshape(-1, *array.shape)
        np.testing.assert_allclose(got, np.broadcast_to(array, got.shape), atol=1e-6)


def counted(found: list[tuple[str, int]]) -> str:
    """ "2 all-reduce" """
    kinds = [kind for kind, _ in found]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "-"


def seconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Return the time of the fastest call."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead")
    args = parser.parse_args()
    if jax.device_count() < 8:
        have = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        raise SystemExit(f"this takes 8 devices, found {have}: try JAX_PLATFORMS=cpu")
    rows = [measure(way) for way in ways()]
    if args.json:
        print(json.dumps(rows))
        return
    print(f"jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}\n")
    print("| " + " | ".join(HEADER) + " |")
    print("|" + "---|" * len(HEADER))
    for row in rows:
        print("| " + " | ".join(row[name] for name in HEADER) + " |")
    print("\nKB: results of all collectives on one device. ms: the fastest of 20 forward passes.")


if __name__ == "__main__":
    main()
