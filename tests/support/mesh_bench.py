"""`infer.bench` on meshes of eight devices: run by tests/infer/bench/test_bench_mesh.py."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, cache_sharding, make_mesh, params_sharding, parse_mesh
from glm2_jax.errors import GLMError
from glm2_jax.schemes import SCHEMES
from infer.bench import __main__ as bench
from infer.bench import programs, random_params
from infer.bench import run as suite
from infer.bench.ceilings import Ceilings
from infer.engine import executor
from infer.engine.programs import Programs
from infer.engine.steps import State

CONFIG = GLMConfig(1, 104, 32, 64, 8, 2, 8, 256)
MESH = "data=2,tensor=4"
TWO_HEADS = GLMConfig(1, 104, 32, 64, 2, 2, 8, 256)
CEILINGS = Ceilings(copy=10e9, read=20e9, matmul={"bfloat16": 2e12, "float32": 1e12})
SMALL = ("--steps", "2", "--repeat", "2", "--json", "--device", "cpu")


def command(*args: str) -> Any:
    """What `python -m infer.bench` prints as JSON, and writes on standard error; or its error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            bench.main([*args, *SMALL])
        except GLMError as error:
            return [type(error).__name__, error.what, error.why, error.fix]
    return [json.loads(out.getvalue()), err.getvalue()]


def random_weights(scheme: str | None, as_list: bool) -> dict[str, Any]:
    """Compare random weights on a mesh: values with one device, sharding with loaded ones."""
    mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
    form: dict[str, Any] = {"scheme": SCHEMES.get(scheme or "none"), "as_list": as_list}
    one = random_params.random_params(CONFIG, jnp.float32, **form)
    cut = random_params.random_params(CONFIG, jnp.float32, **form, mesh=mesh)
    places = params_sharding(CONFIG, mesh, **form)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(cut), strict=True)
    return {
        "same": all(np.array_equal(x, y) for x, y in pairs),
        "cut": all(jax.tree.leaves(jax.tree.map(lambda x, at: x.sharding == at, cut, places))),
    }


def making() -> dict[str, int]:
    """Bytes of the program that makes a weight in its parts: of a part, and what it takes more."""
    place = params_sharding(CONFIG, make_mesh(parse_mesh("tensor=8")))["head"]
    shape = CONFIG.vocab_size, CONFIG.hidden_size
    made = random_params._program(random_params._floats, place, shape, np.dtype("float32"))
    memory: Any = made.lower(np.uint32(1)).compile().memory_analysis()
    return {"part": memory.output_size_in_bytes, "more": memory.temp_size_in_bytes}


class Noting(Programs):
    """Keeps the states that programs take and give."""

    states: list[State] = []

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.note(result := super().call(*args, **kwargs))
        return result

    def note(self, made: Any) -> None:
        for part in made if type(made) is tuple else (made,):
            if isinstance(part, State):
                self.states.append(part)


def states(mesh: str) -> dict[str, Any]:
    """How the cache of the steps is sharded, its rows, and whether each step took it over."""
    want = cache_sharding(CONFIG, make_mesh(parse_mesh(mesh))).k
    caches: list[Any] = [state.cache for state in Noting.states]
    return {
        "places": [cache.k.sharding == want for cache in caches],
        "rows": [cache.length.size for cache in caches],
        "taken over": [cache.k.is_deleted() for cache in caches],
    }


def main() -> None:
    # Machine code takes longest to make, and is not what is looked at.
    jax.config.update("jax_disable_most_optimizations", True)
    suite.measure_ceilings = lambda device: CEILINGS
    executor.Programs = Noting
    programs.PREFILL_CHUNK = 16  # prompts are read in parts
    folder = Path(sys.argv[1])
    for name, config in (("eight", CONFIG), ("two", TWO_HEADS)):
        (folder / name).write_text(json.dumps(config.to_hf()), encoding="utf-8")
    eight, two = str(folder / "eight"), str(folder / "two")
    shapes = ("--prompts", "20", "--batches", "3", "--contexts", "8")
    found = {
        "devices": jax.device_count(),
        "random": command("--random", eight, "--mesh", MESH, *shapes),
        "loaded": command("--mesh", "data=4,tensor=2", "--prompts", "none", "--batches", "none"),
        "weights": [
            random_weights(*form) for form in ((None, False), ("int8", True), ("int4", False))
        ],
        "making": making(),
        "states": states(MESH),
        "bad": {
            "--tp 4": command("--random", eight, "--tp", "4"),
            "two heads": command("--random", two, "--tp", "8"),
        },
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
