"""`python -m infer.bench` on meshes: what is counted and said, and that nothing is ever whole."""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import GLMConfig, make_mesh, params_sharding, parse_mesh
from glm2_jax.config import PRESETS
from glm2_jax.errors import GLMError, UsageError
from glm2_jax.schemes import SCHEMES
from infer.bench import __main__ as bench
from infer.bench import harness, programs
from infer.bench.ceilings import Ceilings
from infer.bench.programs import Shape, work
from infer.bench.report import Report, Result, as_json, render
from infer.bench.subject import Variant, describe_mesh
from infer.memory.cards import LINKS
from infer.memory.mesh_cost import mesh_cost
from infer.memory.precision import Precision
from infer.memory.shares import sizes_of
from infer.tuning import random_params
from tests.support.mesh_process import run
from tests.support.toy import TOY

SIX = PRESETS["chatglm2-6b"]
ONE = Ceilings(copy=10e9, read=20e9, matmul={"bfloat16": 2e12, "float32": 1e12})
CONFIG = GLMConfig(1, 104, 32, 64, 8, 2, 8, 256)


@pytest.mark.parametrize(
    ("sizes", "scheme"),
    [({"data": 2, "tensor": 4}, "int8"), ({"data": 2, "fsdp": 2, "tensor": 2}, None)],
)
def test_bytes_and_operations_are_those_of_the_cost_model(sizes, scheme):
    """Which counts no rows of the embedding, and one device."""
    links, rows = LINKS["v5e"], -(-3 // (sizes.get("data", 1) * sizes.get("fsdp", 1)))
    cost = mesh_cost(SIX, sizes, links, batch=3, length=100, scheme=scheme)
    shapes = {"decode": Shape(3, context=99), "prefill": Shape(3, prompt=100)}
    for name, shape in shapes.items():
        precision, step = Precision("bfloat16", scheme), cost.steps[name]
        moved, flops = work(SIX, precision, shape, "tpu", sizes_of(sizes))
        embedded = rows * max(shape.prompt, 1) * SIX.hidden_size * 2
        read = step.memory_s * links.card.bandwidth + embedded
        assert moved == pytest.approx(8 * read, rel=1e-12), name
        assert flops == pytest.approx(8 * step.products_s * links.flops, rel=1e-12), name


def test_what_is_on_several_devices_counts_on_each():
    config, plain = dataclasses.replace(TOY, vocab_size=96), Precision("float32")
    one, half = (work(config, plain, Shape(rows, context=7), "cpu") for rows in (4, 2))

    def of(rows: int = 4, **sizes: int) -> tuple[float, float]:
        return work(config, plain, Shape(rows, context=7), "cpu", sizes_of(sizes))

    assert of() == one
    assert of(data=2) == of(fsdp=2) == (2 * half[0], 2 * half[1]) == of(rows=3, data=2)


def test_ceilings_are_those_of_all_devices_where_these_are_real(monkeypatch):
    mesh: Any = SimpleNamespace(size=8, shape={"data": 2, "tensor": 4})
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: ONE)
    found = harness.ceilings_of(SimpleNamespace(platform="tpu"), mesh)
    assert found == Ceilings(80e9, 160e9, {"bfloat16": 16e12, "float32": 8e12}, 8)
    assert harness.ceilings_of(SimpleNamespace(platform="cpu"), mesh) == ONE
    assert harness.ceilings_of(SimpleNamespace(platform="gpu"), None) == ONE
    assert describe_mesh(mesh, "gpu") == "data=2,tensor=4, 8 devices"
    assert "one CPU" in describe_mesh(mesh, "cpu")


def test_the_report_names_mesh_and_devices():
    variant, shape = Variant("float32", "none", "list"), Shape(2, context=9)
    result = Result(variant, shape.name, {}, 2, 8e9, 8e9, [0.5, 0.25])
    report = Report({"device": "x"}, ONE.times(8), [result], complete=True, mesh={"tensor": 8})
    found, text = as_json(report), " ".join(render(report, 300).split())
    assert found["mesh"] == {"tensor": 8} and found["devices"] == 8
    assert found["ceilings"]["devices"] == 8 and found["results"][0]["of_bandwidth"] == 0.2
    assert "bandwidth (on one device, times 8): copy 80 GB/s, read 160 GB/s" in text
    assert "tok/s are of all devices together" in text
    alone = Report({"device": "x"}, ONE, [result], complete=True)
    assert as_json(alone)["mesh"] is None and as_json(alone)["devices"] == 1
    assert "together" not in render(alone, 300) and "times" not in str(alone)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tp", "2", "--peer", "transformers"], "--peer: not supported on a mesh"),
        (["--tp", "7"], "tensor=7 needs 7 devices"),
    ],
)
def test_what_is_refused(args, message, monkeypatch):
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: pytest.fail("measures"))
    with pytest.raises(UsageError, match=message):
        bench.main([*args, "--device", "cpu"])


# On eight devices


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(__name__, str(tmp_path_factory.mktemp("bench")))


def test_measuring_on_a_mesh(found):
    report, said = found["random"]
    assert report["devices"] == 8 and report["complete"]
    assert report["mesh"] == {"data": 2, "tensor": 4, "fsdp": 1}
    assert report["about"]["mesh"].startswith("data=2,tensor=4, 8 virtual devices")
    assert report["ceilings"] == {"copy": 10e9, "read": 20e9, "devices": 1} | {
        "matmul": {"bfloat16": 2e12, "float32": 1e12}
    }
    prefill, decode = report["results"]
    assert prefill["shape"]["prompt"] == 20 and decode["shape"]["batch"] == 3
    for result in report["results"]:
        assert result["variant"]["layers"] == "list" and not result["problem"]
        assert result["bytes_per_s"] == result["bytes"] / min(result["seconds"])
    # Of three rows, though four are computed.
    assert decode["tokens_per_s"] == pytest.approx(3 / min(decode["seconds"]))
    assert "72.4 kB of weights, 21.6 kB on each device" in said


def test_weights_are_loaded_and_made_in_their_parts(found):
    report, said = found["loaded"]
    assert report["about"]["model"] == "demo (bundled)" and "4.7 MB on each device" in said
    assert report["mesh"] == {"data": 4, "tensor": 2, "fsdp": 1} and report["results"] == []
    assert all(one == {"same": True, "cut": True} for one in found["weights"])
    assert found["making"]["part"] == 104 * 32 * 4 // 8 and found["making"]["more"] < 64


def test_a_mesh_has_to_fit_every_form(found):
    assert found["second form"][0] == "UsageError"
    assert "two columns share a byte" in found["second form"][2]


# The script that runs there


def command(*args: str) -> Any:
    """What `python -m infer.bench` prints as JSON, and writes on standard error; or its error."""
    out, err = io.StringIO(), io.StringIO()
    small = ("--steps", "2", "--repeat", "2", "--json", "--device", "cpu")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            bench.main([*args, *small])
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
    made = random_params._program(shape, np.dtype("float32"), place)
    memory: Any = made.lower(np.uint32(1)).compile().memory_analysis()
    return {"part": memory.output_size_in_bytes, "more": memory.temp_size_in_bytes}


def main() -> None:
    harness.measure_ceilings = lambda device: ONE
    programs.PREFILL_CHUNK = 16  # prompts are read in parts
    folder, none = Path(sys.argv[1]), ("--prompts", "none", "--batches", "none")
    # The ffn of the second is cut into 8, but not where two columns share a byte.
    for name, config in (("eight", CONFIG), ("odd", GLMConfig(1, 104, 32, 8, 8, 8, 8, 256))):
        (folder / name).write_text(json.dumps(config.to_hf()), encoding="utf-8")
    eight, odd = str(folder / "eight"), str(folder / "odd")
    shapes = ("--prompts", "20", "--batches", "3", "--contexts", "8")
    found = {
        "random": command("--random", eight, "--mesh", "data=2,tensor=4", *shapes),
        "loaded": command("--mesh", "data=4,tensor=2", *none),
        "weights": [random_weights("int8", True), random_weights("int4", False)],
        "making": making(),
        "second form": command("--random", odd, "--tp", "8", "--quantize", "int8,int4"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
