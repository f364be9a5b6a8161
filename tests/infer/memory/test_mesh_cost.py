"""The cost of a mesh against arithmetic by hand and the plan for one device."""

import math

import pytest

from glm2_jax import PRESETS, UsageError, parse_mesh
from infer.memory.cards import LINKS, find_links
from infer.memory.mesh_cost import Talk, all_reduce, gather, mesh_cost, report
from infer.memory.plan import Plan, cache_bytes, rate_bound, weight_bytes
from infer.memory.precision import Precision

SIX = PRESETS["chatglm2-6b"]
V5E, H200 = LINKS["v5e"], LINKS["h200"]


def cost(mesh: str, rows: int = 8, length: int = 64):
    return mesh_cost(SIX, parse_mesh(mesh), V5E, batch=rows, length=length)


def test_collectives_by_hand():
    sizes = {"data": 1, "fsdp": 1, "tensor": 8}
    talk = all_reduce(V5E, sizes, "tensor", 800e6)
    assert talk.link_bytes == 2 * 7 / 8 * 800e6 and talk.network_bytes == 0 and talk.calls == 1
    assert talk.seconds == pytest.approx(1.4e9 / 100e9 + 8e-6)
    half = gather(H200, sizes, "tensor", 800e6)
    assert half.seconds == pytest.approx(0.7e9 / 450e9 + 6.6e-6 + 7 * 0.6e-6)
    assert gather(V5E, sizes, "data", 1e9) == all_reduce(V5E, sizes, "fsdp", 1e9) == Talk()
    talk = gather(V5E, {"tensor": 2}, "tensor", 100e6)  # two neighbors share one link
    assert talk.link_bytes == 50e6 and talk.seconds == pytest.approx(1e-3 + 1e-6)
    # 64 rows of 8 neighbors in servers of 8: the axis of 64 goes from server to server.
    talk = all_reduce(H200, {"data": 64, "tensor": 8}, "data", 64e6)
    assert talk.link_bytes == 0 and talk.network_bytes == 2 * 63e6
    # The other way round its 8 nearest are in the server, and carry an eighth of it outside.
    talk = all_reduce(H200, {"tensor": 8, "data": 64}, "data", 64e6)
    assert talk.link_bytes == 2 * 56e6 and talk.network_bytes == 2 * 7e6
    assert all_reduce(V5E, {"data": 32, "tensor": 8}, "data", 1e6).network_bytes == 0
    assert all_reduce(V5E, {"data": 64, "tensor": 8}, "data", 1e6).network_bytes > 0


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_one_device_is_what_its_plan_says(scheme):
    precision = Precision("bfloat16", scheme)
    found = mesh_cost(SIX, {}, H200, batch=4, length=1024, scheme=scheme)
    assert found.weights == weight_bytes(SIX, precision)
    assert found.cache == cache_bytes(SIX, 2, 1024, 4)
    step = found.steps["decode"]
    bound = rate_bound(Plan(SIX, precision, 1024, 4), H200.card.bandwidth)
    assert 4 / step.memory_s == pytest.approx(bound)
    assert step.talk == Talk() and step.limit == "memory" and step.serial_s == step.overlapped_s
    assert found.trained == 18 * SIX.num_params


def test_operations_are_those_of_the_matrices_and_of_attention():
    steps = cost("data=1", 2, 100).steps
    D, F, H, N, K, V = 4096, 13696, 128, 32, 2, 65024
    layers = 28 * (D * H * (N + 2 * K) + N * H * D + 3 * D * F)
    pairs = 2 * 100 * 101 / 2
    prefill = 2 * 200 * layers + 2 * 2 * V * D + 28 * 4 * N * H * pairs
    assert steps["prefill"].products_s * V5E.flops == pytest.approx(prefill)
    full = 3 * (2 * 200 * (layers + V * D) + 28 * 4 * N * H * pairs)
    assert steps["full"].products_s * V5E.flops == pytest.approx(full)


def test_axes_cut_what_the_rules_say():
    one, eight = cost("data=1"), cost("tensor=8")
    keys = 28 * 2 * (2 * 128) * (4096 + 1) * 2  # with biases: on every device
    norms = (28 * 2 + 1) * 4096 * 2
    assert eight.weights == (one.weights - keys - norms) // 8 + keys + norms
    assert eight.cache == one.cache and cost("tensor=2").cache == one.cache // 2
    assert cost("data=8").cache == one.cache // 8 and cost("data=8").weights == one.weights
    assert cost("data=8", 3).cache == one.cache // 8  # empty rows fill it up
    assert cost("fsdp=8").trained < one.trained / 7.9
    # 2 all-reduces a layer and the embedding's, and the gathered logits; see the compiled programs.
    assert eight.steps["decode"].talk.calls == 2 * 28 + 2
    assert cost("data=8").steps["decode"].talk == Talk()
    assert cost("fsdp=8").steps["full"].talk.calls == 3 * (28 * 6 + 2)
    assert cost("data=8").steps["full"].talk.calls == 1


def test_how_many_tokens_are_enough():
    for text in ("fsdp=8", "data=2,tensor=4", "data=8"):
        few = cost(text).steps["full"]
        assert few.limit != "products" and few.tokens_needed is not None
        rows = 8 * math.ceil(few.tokens_needed / 64 / 8)
        limits = [cost(text, n).steps["full"].limit for n in (rows, rows - 8)]
        assert limits[0] == "products" != limits[1]
    steps = cost("tensor=8", 8, 2048).steps
    assert steps["decode"].tokens_needed is None  # each device reads the whole cache of a row
    assert steps["prefill"].tokens_needed is None  # an all-reduce takes longer than its products


def test_names_of_devices():
    assert find_links("v5e-8", 8) is find_links("v5e", 3) is V5E
    assert find_links("8xh200", 8) is H200
    with pytest.raises(UsageError, match="not known") as caught:
        find_links("3090", 2)
    assert "v5e, v5p, h200" in caught.value.why
    with pytest.raises(UsageError, match="v5p-8 has 8 devices, but the mesh needs 4"):
        find_links("v5p-8", 4)
    with pytest.raises(UsageError, match="does not fit"):
        cost("tensor=3")


def test_the_report_tells_what_does_not_fit():
    lines = report(cost("fsdp=2", 2, 2048))
    text = "\n".join(lines)
    assert lines[0] == "mesh fsdp=2 of 2 x v5e: bfloat16, 2 x 2,048 tokens"
    assert "weights 6.2 GB, cache 58.7 MB, without activations\n" in text
    assert "all parameters 56.2 GB (too much)" in text
    names = [line.split(":")[0].strip() for line in lines if ": memory " in line]
    assert names == ["decode", "prefill", "lora", "full"]
