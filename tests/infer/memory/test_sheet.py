"""The sheet of plans: which are made, what fits, and how it is printed."""

import pytest

from glm2_jax import PRESETS
from infer.memory.budget import Budget, find_budget
from infer.memory.plan import Plan, largest_context, rate_bound
from infer.memory.precision import Precision
from infer.memory.shares import sizes_of
from infer.memory.sheet import as_json, make_sheet, render

SIX = PRESETS["chatglm2-6b"]
GB = 10**9
INT8 = Precision("bfloat16", "int8")


def sheet(budget=None, **options):
    budget = budget or find_budget("3090")
    return make_sheet("six", SIX, budget, contexts=(2048, 8192), batches=(1, 8), **options)


def test_a_plan_for_every_precision_context_and_batch():
    found = sheet()
    assert [plan.precision.name for plan in found.plans[::4]] == [
        "float32", "bfloat16", "int8", "int4",
    ]  # fmt: skip
    assert [(p.context, p.batch) for p in found.plans[:4]] == [
        (2048, 1), (2048, 8), (8192, 1), (8192, 8),
    ]  # fmt: skip
    plan = next(p for p in found.plans if p == Plan(SIX, INT8, 8192, 8))
    assert found.budget.fits(plan) and not found.budget.fits(found.plans[0])
    assert found.rate(plan) == rate_bound(plan, 936e9)
    assert found.longest["int8", 8] == largest_context(plan, found.budget.memory or 0)
    assert found.longest["float32", 1] == 0 and not found.nothing_fits
    assert sheet(find_budget("3090", 2 * GB)).nothing_fits


def test_flags_leave_fewer_precisions_open():
    assert set(sheet(dtype="float16").labels.values()) == {"float16"}
    assert set(sheet(quantize="int8").labels.values()) == {"int8"}
    processor = Budget("this processor", "cpu", 20 * GB)
    labels = sheet(processor, quantize="int4+embeddings").labels.values()
    assert set(labels) == {"float32:int4+embeddings", "bfloat16:int4+embeddings"}
    stored = sheet(stored="int4-row").labels
    assert Precision("bfloat16", "int4-row") in stored and INT8 not in stored
    assert {plan.chunk for plan in sheet(chunk=512, columns=3).plans} == {512}


@pytest.mark.parametrize("columns", [44, 100])
def test_table(columns):
    lines = list(render(sheet(), columns))
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= columns
    assert "six, 6.24 billion parameters, on 3090: 24.5 GB to use, 936 GB/s" in text
    assert ("weights in" in text) == (columns == 100)  # else a table for each precision
    assert ("int8, weights 6.8 GB" in text) == (columns == 44)
    plan = Plan(SIX, INT8, 8192)
    row = f"8,192 1 {'' if columns == 44 else '6.8 GB 234.9 MB '}"
    assert row in text and f"{plan.total / 1e9:.1f} GB yes {rate_bound(plan, 936e9):.0f}" in text
    assert "longest context that fits, batch 8: float32 none, bfloat16" in text


def test_an_unknown_memory_and_a_mesh():
    unknown = sheet(Budget("the TPU", "tpu", None))
    text = " ".join(" ".join(render(unknown, 100)).split())
    assert "memory unknown" in text and "bandwidth is not known here" in text and " ? ?" in text
    assert as_json(unknown)["fits"] is None and as_json(unknown)["longest_context"] == []
    spread = sheet(quantize="none", mesh=sizes_of({"tensor": 8}))
    text = " ".join(" ".join(render(spread, 100)).split())
    assert "on 8 devices (3090, tensor=8)" in text and "All sizes are those of each device" in text
    assert as_json(spread)["mesh"] == {"data": 1, "fsdp": 1, "tensor": 8}
    assert spread.plans[0].weights < Plan(SIX, Precision("bfloat16"), 2048).weights / 7
