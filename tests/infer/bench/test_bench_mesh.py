"""`python -m infer.bench` on meshes: what is counted and said, and that nothing is ever whole."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import jax
import pytest

from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.config import PRESETS
from glm2_jax.errors import UsageError
from glm2_jax.schemes import SCHEMES
from infer.bench import __main__ as bench
from infer.bench import run as suite
from infer.bench.ceilings import Ceilings
from infer.bench.measure import Result, Shape, Variant, work
from infer.bench.report import Report, as_json, render
from infer.bench.subject import Subject, describe_mesh
from infer.memory.cards import LINKS
from infer.memory.mesh_cost import mesh_cost
from infer.memory.precision import Precision
from infer.memory.shares import sizes_of
from tests.support.mesh_process import run
from tests.support.toy import TOY

SIX = PRESETS["chatglm2-6b"]
ONE = Ceilings(copy=10e9, read=20e9, matmul={"bfloat16": 2e12, "float32": 1e12})
MESHES = [
    ({"tensor": 8}, None),
    ({"data": 2, "tensor": 4}, "int8"),
    ({"data": 8}, "int4"),
    ({"data": 2, "fsdp": 2, "tensor": 2}, None),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run("tests.support.mesh_bench", str(tmp_path_factory.mktemp("bench")))


# What is counted


@pytest.mark.parametrize(("sizes", "scheme"), MESHES)
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
    # In halves on two devices: matrices, keys and values. Whole on each: norms, and what is looked
    # up in the embedding.
    norms, embedded = 3 * 2 * 48 + 48, 4 * 48
    assert of(tensor=2) == (one[0] + 4 * (norms + embedded), one[1])
    # Beyond as many devices as there are key/value heads each has all of them: their matrices,
    # biases, and 8 keys and values of 4 rows.
    matrices = 3 * 2 * 2 * 16 * 48
    heads = matrices + 3 * 2 * 2 * 16 * (1 + 4 * 8)
    assert of(tensor=4)[0] == one[0] + 3 * 4 * (norms + embedded + heads)
    assert of(tensor=4)[1] == one[1] + 3 * 2 * 4 * matrices


# What is possible at most


def test_ceilings_are_those_of_all_devices_where_these_are_real(monkeypatch):
    mesh: Any = SimpleNamespace(size=8)
    monkeypatch.setattr(suite, "measure_ceilings", lambda device: ONE)
    for platform in ("gpu", "tpu"):
        found = suite.ceilings_of(SimpleNamespace(platform=platform), mesh)
        assert found == Ceilings(80e9, 160e9, {"bfloat16": 16e12, "float32": 8e12}, 8)
    assert found.better(ONE.times(8)) == found
    assert suite.ceilings_of(SimpleNamespace(platform="cpu"), mesh) == ONE
    assert suite.ceilings_of(SimpleNamespace(platform="gpu"), None) == ONE


# What is said


def test_the_report_names_mesh_and_devices():
    result = Result(Variant("float32", "none", "list"), Shape(2, context=9), 8e9, 8e9, [0.5, 0.25])
    report = Report({"device": "x"}, ONE.times(8), [result], complete=True, mesh={"tensor": 8})
    found, text = as_json(report), " ".join(render(report, 300).split())
    assert found["mesh"] == {"tensor": 8} and found["devices"] == 8
    assert found["ceilings"]["devices"] == 8 and found["results"][0]["of_bandwidth"] == 0.2
    assert "bandwidth (on one device, times 8): copy 80 GB/s, read 160 GB/s" in text
    assert "tok/s are of all devices together" in text
    alone = Report({"device": "x"}, ONE, [result], complete=True)
    assert as_json(alone)["mesh"] is None and as_json(alone)["devices"] == 1
    assert "together" not in render(alone, 300) and "times" not in str(alone)


def test_a_line_says_what_virtual_devices_share():
    mesh: Any = SimpleNamespace(size=8, shape={"data": 2, "tensor": 4})
    assert describe_mesh(mesh, "gpu") == "data=2,tensor=4, 8 devices"
    assert "one CPU" in describe_mesh(mesh, "cpu")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tp", "2", "--peer", "transformers"], "--peer: not supported on a mesh"),
        (["--coordinator", "host:1"], "--coordinator: not supported by this command"),
        (["--mesh", "data=2,model=4"], "is not valid"),
        (["--tp", "7"], "tensor=7 needs 7 devices"),
    ],
)
def test_what_is_refused(args, message, monkeypatch):
    monkeypatch.setattr(suite, "measure_ceilings", lambda device: pytest.fail("measures"))
    with pytest.raises(UsageError, match=message):
        bench.main([*args, "--device", "cpu"])


def test_a_mesh_has_to_fit_every_form():
    mesh = cast(Any, {"fsdp": 4096})
    subject = Subject(ModelChoice(), jax.devices()[0], mesh, random="chatglm2-6b", layers=1)
    subject.check_forms((None, "int8"))
    with pytest.raises(UsageError, match="two columns share a byte") as error:
        subject.check_forms(("int8", "int4"))
    assert error.value.what == "The mesh fsdp=4096 does not fit the model."
    assert SCHEMES["int4"].bits == 4


# On eight devices


def test_measuring_on_a_mesh(found):
    report, said = found["random"]
    assert found["devices"] == report["devices"] == 8 and report["complete"]
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


def test_arrays_lie_where_the_engine_has_them(found):
    states = found["states"]
    assert all(states["places"]) and len(states["places"]) > 6
    assert set(states["rows"]) == {2, 4}  # of one prompt, and of three answers
    assert states["taken over"].count(False) == 2  # the last ones


def test_a_checkpoint_is_loaded_in_its_parts(found):
    report, said = found["loaded"]
    assert report["about"]["model"] == "demo (bundled)" and "4.7 MB on each device" in said
    assert report["mesh"] == {"data": 4, "tensor": 2, "fsdp": 1} and report["results"] == []


def test_random_weights_are_made_in_their_parts(found):
    assert all(one == {"same": True, "cut": True} for one in found["weights"])
    assert found["making"]["part"] == 104 * 32 * 4 // 8 and found["making"]["more"] < 64


def test_bad_meshes_are_told_as_elsewhere(found):
    bad = found["bad"]
    assert {kind for kind, *_ in bad.values()} == {"UsageError"}
    assert bad["--tp 4"][2] == "There are 8 devices, and a mesh uses all of them."
    assert bad["two heads"][1] == "The mesh tensor=8 does not fit the model."
    assert bad["two heads"][3] == "Use tensor=1, 2."
