"""`python -m infer.memory.compile_for`: what XLA says that a model needs on a device that is not
here.

A process of its own, started by `infer.memory.compiler`: the compiler reads its environment when
jax starts, keeps others of its kind out, and may end the process. It reads a request from standard
input and prints the answer, both JSON. No weights and no device: programs are compiled from shapes.
"""

import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from glm2_jax import GLMConfig, KVCache, last_logits
from glm2_jax.runtime.xla import cache_dtype
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params


def peak_bytes(
    config: GLMConfig, precision: Precision, slots: int, rows: int, width: int, device: Any
) -> int:
    """Return the peak bytes of reading `width` tokens of every row, weights and cache included;
    raises JaxRuntimeError where it does not fit.

    Drawing a token from the logits is left out: compiling it takes longer than all the rest, and
    it needs a few megabytes.
    """
    kind = cache_dtype(device.platform, jnp.dtype(precision.dtype))
    cache = jax.eval_shape(lambda: KVCache.zeros(config, rows, slots, kind))
    tokens, last = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, width), (rows,)))
    place = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    args = (abstract_params(config, precision), tokens, last, cache)
    args = jax.tree.map(lambda x: place(x.shape, x.dtype), args)

    def forward(params: Any, tokens: Any, last: Any, cache: KVCache) -> Any:
        return last_logits(config, params, tokens, last, cache=cache)

    lowered = jax.jit(forward, donate_argnums=3).lower(*args)
    memory = lowered.compile().memory_analysis()
    assert memory is not None  # every compiler that this is for reports it
    return memory.peak_memory_in_bytes


def main() -> None:
    """Answer one request: {"peak": {program: bytes}} and, where one failed, {"error": text}."""
    request = json.load(sys.stdin)
    config = GLMConfig(**request["config"])
    precision = Precision(request["dtype"], request["quantize"])
    device = topologies.get_topology_desc(
        request["topology"],
        request["platform"],
        chips_per_host_bounds=(1, 1, 1),  # older versions of libtpu assume four chips
    ).devices[0]
    peak: dict[str, int] = {}
    answer: dict[str, Any] = {"peak": peak}
    try:
        for name, width in request["programs"].items():
            rows = request["rows"]
            peak[name] = peak_bytes(config, precision, request["slots"], rows, width, device)
    except jax.errors.JaxRuntimeError as error:
        answer["error"] = str(error)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
