"""A TPU compiler's own figures beside a plan: asked of libtpu, where that is installed.

The compiler needs no TPU. It runs in a process of its own, `infer.memory.compile_for`, so nothing
here starts jax.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from glm2_jax.config import GLMConfig
from infer.memory.cards import CARDS
from infer.memory.plan import Plan

EXTRA = (
    "The compiler's own figures can be had without a TPU, with an extra: "
    "pip install 'glm2-jax[tpu-compile]'"
)
ABOUT = (
    "step and prompt are XLA's peak, weights and cache included, drawing a token left out; "
    "a G of its own is 1024^3 bytes"
)
# jax looks for no accelerator and libtpu asks no metadata server which one this machine has.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_MODULE = "infer.memory.compile_for"


@dataclass(frozen=True)
class Verdict:
    """What the compiler says of one plan.

    Attributes:
      step, prompt: bytes at the worst moment of a step of an answer, and of reading a chunk of a
        prompt; None where that was not compiled.
      problem: why not; "" where all was.
      fits: None where the compiler could not be asked.
    """

    plan: Plan
    step: int | None
    prompt: int | None
    problem: str
    fits: bool | None


def knows(name: str) -> bool:
    """Whether there is a compiler that can be asked about a device of this name."""
    return name in CARDS and CARDS[name].topology is not None


def installed() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def ask(config: GLMConfig, plan: Plan, name: str, memory: int | None, chunk: int) -> Verdict:
    """Compiles a step and a chunk of a prompt for a card, and reads what they need.

    Args:
      name: of the card, one that it `knows`.
      memory: bytes that may be taken; None = what the compiler thinks.
      chunk: most tokens of a prompt, all rows together, that are read at once.
    """
    card = CARDS[name]
    request = {
        "config": dataclasses.asdict(config),
        "platform": card.platform,
        "topology": card.topology,
        "dtype": plan.precision.dtype,
        "quantize": plan.precision.quantize,
        "slots": plan.context,
        "rows": plan.rows,
        "programs": {"step": 1, "prompt": min(max(1, chunk // plan.rows), plan.context)},
    }
    answer = _run(request)
    peak, problem = answer.get("peak", {}), answer.get("error", "")
    fits: bool | None = None
    if not problem:
        fits = memory is None or max(peak.values()) <= memory
    elif "RESOURCE_EXHAUSTED" in problem:
        fits = False
    return Verdict(plan, peak.get("step"), peak.get("prompt"), _sentence(problem), fits)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of the other process; {"error": text} where it gave none."""
    done = subprocess.run(
        [sys.executable, "-m", _MODULE],
        input=json.dumps(request),
        env=os.environ | _ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines()
        return {"error": said[-1] if said else f"the compiler ended with {done.returncode}"}


def _sentence(problem: str) -> str:
    """The compiler's first sentence without its codes ("RESOURCE_EXHAUSTED: E1000: Oom: ")."""
    words = (problem.splitlines() or [""])[0].split(": ")
    while len(words) > 1 and " " not in words[0]:
        words.pop(0)
    return ": ".join(words).split(". ")[0].removesuffix(".")
