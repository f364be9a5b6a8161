"""A TPU compiler's own figures for a plan: asked of libtpu, where that is installed.

The compiler needs no TPU. It runs in a process of its own, `python -m infer.memory.compiler`, since
it reads its environment when jax starts, keeps others of its kind out, and may end the process.
Nothing else here starts jax.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from glm2_jax.config import GLMConfig
from glm2_jax.extras import pip_install
from infer.memory.cards import CARDS
from infer.memory.plan import Plan
from infer.memory.precision import Precision

EXTRA = (
    "The compiler's own figures are available without a TPU, with its package: "
    f"{pip_install('tpu-compile')}"
)
ABOUT = (
    "step and prompt are XLA's peak, weights and cache included, drawing a token left out; "
    "the G of its messages is 1024^3 bytes"
)
# jax does not look for an accelerator; libtpu does not ask a metadata server which one it is.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_MODULE = "infer.memory.compiler"
_INSTALLED = str(Path(__file__).parents[2])  # the folder that holds this package


@dataclass(frozen=True)
class Verdict:
    """What the compiler says of a plan."""

    plan: Plan
    step: int | None  # peak bytes of a decode step; None where it was not compiled
    prompt: int | None  # the same of a prefill of one chunk
    problem: str  # why something was not compiled; "" where all was
    fits: bool | None  # None if the compiler was not available


def knows(name: str) -> bool:
    """Return whether a compiler can be asked about a device of this name."""
    return name in CARDS and CARDS[name].topology is not None


def installed() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def ask(plan: Plan, name: str, memory: int | None) -> Verdict:
    """Compile a decode step and a prefill of one chunk for a card that the compiler `knows`, and
    read what they need; `memory` bytes may be taken, None = what the compiler thinks."""
    card = CARDS[name]
    request = {
        "config": plan.config.to_fields(),
        "platform": card.platform,
        "topology": card.topology,
        "dtype": plan.precision.dtype,
        "quantize": plan.precision.quantize,
        "kv": plan.kv,
        "slots": plan.context,
        "rows": plan.rows,
        "programs": {"step": 1, "prompt": min(max(1, plan.prefill // plan.rows), plan.context)},
    }
    answer = _run(request)
    peak, problem = answer.get("peak", {}), answer.get("error", "")
    fits: bool | None = None
    if not problem:
        fits = memory is None or max(peak.values()) <= memory
    elif "RESOURCE_EXHAUSTED" in problem:
        fits = False
    return Verdict(plan, peak.get("step"), peak.get("prompt"), first_sentence(problem), fits)


def first_sentence(problem: str) -> str:
    """Return it without the codes of a compiler's message ("RESOURCE_EXHAUSTED: E1000: Oom: ")."""
    words = (problem.splitlines() or [""])[0].split(": ")
    while len(words) > 1 and " " not in words[0]:
        words.pop(0)
    return ": ".join(words).split(". ")[0].removesuffix(".")


def _run(request: dict[str, Any]) -> dict[str, Any]:
    return run_apart(_MODULE, request)


def run_apart(module: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of another process, which runs a module of ours; {"error": text} where it
    gave none."""
    # Without -P, and this path in front, a folder `infer` of the user's would be imported.
    paths = [_INSTALLED, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", "-m", module],
        input=json.dumps(request),
        env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines()
        return {"error": said[-1] if said else f"the compiler exited with code {done.returncode}"}


def peak_bytes(
    config: GLMConfig,
    precision: Precision,
    slots: int,
    rows: int,
    width: int,
    device: Any,
    kv: str = "auto",
) -> int:
    """Return the peak bytes of reading `width` tokens of every row, weights and cache included;
    raises JaxRuntimeError where it does not fit. Programs are compiled from shapes.

    Drawing a token from the logits is left out: compiling it takes longer than all the rest, and
    it needs a few megabytes.
    """
    import jax
    import jax.numpy as jnp

    from glm2_jax import KVCache, last_logits
    from glm2_jax.runtime.xla import cache_dtype
    from infer.memory.shares import abstract_params

    kind = cache_dtype(device.platform, jnp.dtype(precision.dtype), kv)
    cache = jax.eval_shape(lambda: KVCache.zeros(config, rows, slots, kind))
    tokens, last = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, width), (rows,)))
    place = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
    args = (abstract_params(config, precision), tokens, last, cache)
    args = jax.tree.map(lambda x: place(x.shape, x.dtype), args)

    def forward(params: Any, tokens: Any, last: Any, cache: KVCache) -> Any:
        return last_logits(config, params, tokens, last, cache=cache)

    lowered = jax.jit(forward, donate_argnums=3).lower(*args)
    memory = lowered.compile().memory_analysis()
    assert memory is not None  # every compiler that this is for reports it
    return memory.peak_memory_in_bytes


def absent_device(topology: str, platform: str) -> Any:
    """Return a device to compile for that need not be here."""
    from jax.experimental import topologies

    bounds = (1, 1, 1)  # older versions of libtpu assume four chips
    return topologies.get_topology_desc(topology, platform, chips_per_host_bounds=bounds).devices[0]


def main() -> None:
    """Answer the request on standard input: {"peak": {program: bytes}} and, where one failed,
    {"error": text}; both are JSON."""
    import jax

    request, peak = json.load(sys.stdin), {}
    config = GLMConfig.from_fields(request["config"])
    precision = Precision(request["dtype"], request["quantize"])
    device = absent_device(request["topology"], request["platform"])
    answer: dict[str, Any] = {"peak": peak}
    try:
        for name, width in request["programs"].items():
            sizes = request["slots"], request["rows"], width
            peak[name] = peak_bytes(config, precision, *sizes, device, request["kv"])
    except jax.errors.JaxRuntimeError as error:
        answer["error"] = str(error)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
