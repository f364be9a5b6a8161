"""The engine on meshes: answers of one device, programs that fit each other, flags and refusals."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from glm2_jax import make_mesh
from glm2_jax.config import PRESETS
from glm2_jax.errors import UsageError
from glm2_jax.runtime.buckets import padded_batch
from glm2_jax.runtime.devices import faster_layers, find_mesh
from infer.engine.placement import Places
from infer.generate import __main__ as generate
from infer.memory.budget import Budget, shared
from infer.memory.plan import Plan
from infer.memory.precision import Precision
from infer.memory.shares import sizes_of
from tests.support.mesh_process import run

SIX, BF16 = PRESETS["chatglm2-6b"], Precision("bfloat16")


@pytest.fixture(scope="module")
def found():
    return run("tests.support.mesh_engine")


def test_meshes_answer_with_the_tokens_of_one_device(found):
    assert found["devices"] == 8 and found["varied"] == 6
    assert [case["mesh"] for case in found["cases"]] == [
        "tensor=8", "tensor=4,data=2", "data=2,fsdp=2,tensor=2", "data=8", "data=2,tensor=4",
    ]  # fmt: skip
    # A batch of three that the rows of a mesh do not divide is padded.
    assert [case["rows"] for case in found["cases"]] == [4, 4, 4, 8, 4]
    assert [padded_batch(count, 6) for count in (1, 6, 7, 9)] == [6, 12, 12, 18]
    for case in found["cases"]:
        assert case["greedy"] and case["sampled"] and case["off"] < 1e-4, case
    # Conversations, threads, parts, adapters, prefixes, drafts, rows of a cache and so on:
    assert len(found["ways"]) == 8
    assert not [name for name, same in found["ways"].items() if not same]


def test_steps_compile_once_and_move_neither_weights_nor_cache(found):
    for case in found["cases"]:
        assert case["programs"] == 3 and case["compiled_when_warm"] == 0, case
        assert case["alias"] >= case["cache"], case
        if "fsdp" in case["mesh"]:
            continue
        kinds = {"all-gather", "all-reduce"} if "tensor" in case["mesh"] else set()
        assert {*case["layers"], *case["outside"]} == kinds, case
        if case["mesh"] == "tensor=8":  # a list of layers: nothing is in a loop
            assert case["layers"] == {} and case["outside"]["all-reduce"] == 2 * 2 + 1, case
        else:
            assert case["layers"] == ({"all-reduce": 2} if "tensor" in case["mesh"] else {}), case
        assert case["largest"] <= case["rows"] * 104, case  # logits; a layer's cache has more


def test_the_command_line(found):
    (text, said), (alone, _) = found["command"]
    assert text == alone and len(text) > 5
    assert "computing in float32, on 8 devices (tensor=8)" in said
    assert found["bad"][:2] == ["UsageError", "The mesh tensor=4 needs 4 devices."]


def test_a_mesh_in_python():
    assert find_mesh("tensor=1").axis_names == find_mesh({"tensor": 1}, "cpu").axis_names
    mesh = make_mesh({"data": 1})
    assert find_mesh(mesh) is mesh
    device = jax.devices()[0]
    for bad, kind, words in (
        ({"model": 1}, None, "is not valid"),
        ({"data": 3}, None, "needs 3 devices"),
        (7, None, "is not a mesh"),
        (Mesh(np.array([device]), ("x",)), None, "with the axes x"),
        (mesh, "cpu", "contradicts"),
        ("data=1", device, "uses all devices of a kind"),
    ):
        with pytest.raises(UsageError, match=words):
            find_mesh(bad, kind)


def test_flags_of_a_mesh():
    flags = generate.parser().parse_args
    assert find_mesh(flags([]).mesh) is None and flags(["--tp", "2"]).mesh == "tensor=2"
    with pytest.raises(SystemExit):
        flags(["--tp", "2", "--mesh", "data=2"])
    assert [faster_layers(name, on_mesh=True) for name in ("cpu", "tpu")] == ["list", "stacked"]
    assert [faster_layers("gpu", rows=rows) for rows in (1, 4, 5)] == ["stacked", "stacked", "list"]
    long = [faster_layers("gpu", rows=2, slots=slots) for slots in (8192, 8200)]
    assert long == ["stacked", "list"]
    assert Places().rows == 1


def test_memory_of_each_device():
    whole = Plan(SIX, BF16, 8192, 8, platform="tpu")
    for sizes, cut, cache_cut in (
        ({"tensor": 8}, 8, 1), ({"data": 2, "tensor": 4}, 4, 2), ({"fsdp": 8}, 8, 8),
    ):  # fmt: skip
        plan = Plan(SIX, BF16, 8192, 8, platform="tpu", mesh=sizes_of(sizes))
        # Beyond its part a device has norms, and keys and values where two heads are not cut.
        assert whole.weights / cut <= plan.weights < whole.weights / cut * 1.07, sizes
        assert plan.cache == whole.cache // cache_cut, sizes
        assert plan.temporary <= whole.temporary
    one = Plan(SIX, BF16, 8192, 1, mesh=sizes_of({"data": 8}))
    assert one.rows == 8
    # Devices that a processor plays share its memory.
    assert shared(Budget("x", "cpu", 8_400_000_000), 8).memory == 1_400_000_000
    assert shared(Budget("x", "gpu", 8), 8).memory == 8
