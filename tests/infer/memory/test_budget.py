"""What fits into memory: the check at the start, advice, the sheet of a dry run, and errors."""

import dataclasses

import jax
import pytest

import infer
from glm2_jax import PRESETS
from glm2_jax.cli.messages import human_size
from glm2_jax.errors import DeviceError, UsageError
from glm2_jax.runtime.machine import Gpu, Nvidia
from infer.engine import load
from infer.generate.__main__ import main
from infer.memory import budget
from infer.memory.budget import Budget, find_budget, set_gpu_share, settle
from infer.memory.cards import CARDS, find_card
from infer.memory.plan import Plan, largest_context, nearest, rate_bound
from infer.memory.precision import Precision, flags, precisions
from infer.memory.shares import sizes_of
from infer.memory.sheet import as_json, make_sheet, render

GB, GIB = 10**9, 2**30
SIX = PRESETS["chatglm2-6b"]
BF16, INT8, INT4 = (Precision("bfloat16", name) for name in (None, "int8", "int4"))


def limited(memory: int) -> Budget:
    return Budget("a card", "gpu", memory, limited=True)


# What fits, and what else does


def test_what_fits_instead():
    wanted = Plan(SIX, BF16, 32768, 8)
    found = nearest(wanted, 20 * GIB, precisions())
    assert all(plan.total <= 20 * GIB for plan in found)
    changes = [(p.precision.name, p.context, p.batch) for p in found]
    assert changes[0] == ("int8", 32768, 8) and changes[2] == ("bfloat16", 32768, 4)
    assert changes[1][0] == "bfloat16" and 0 < changes[1][1] < 32768 and changes[1][2] == 8
    (only,) = nearest(wanted, 6 * GIB, precisions())  # one change is not enough
    assert (only.precision, only.batch) == (INT4, 1) and 0 < only.context <= 32768
    assert nearest(wanted, 2 * GIB, precisions()) == []


def test_fewer_draft_tokens_and_smaller_chunks_fit_nearest():
    plain, drafting = (Plan(SIX, BF16, 1024, 8, "cpu", 64, n) for n in (1, 33))
    assert drafting.temporary == 7 * 8 * 33 * SIX.vocab_size * 4 > 2 * plain.temporary
    with pytest.raises(
        DeviceError, match=r"x 8, --speculate 32 .*\n.*\nWhat fits: --speculate 16 "
    ):
        settle(Budget("here", "cpu", drafting.total - 1), [drafting])
    assert largest_context(plain, plain.total) >= 1024 > largest_context(drafting, plain.total)
    wanted = Plan(SIX, BF16, 8192)
    room = dataclasses.replace(wanted, chunk=512).total
    assert room < dataclasses.replace(wanted, chunk=1024).total < wanted.total
    with pytest.raises(DeviceError, match=r"What fits: --prefill-chunk 512 \("):
        settle(limited(room), [wanted])


def test_a_cache_in_int8_is_named_where_it_makes_the_difference():
    wanted, notes = Plan(SIX, INT4, 32768, 8), []
    room = dataclasses.replace(wanted, kv="int8").total
    assert room < wanted.total
    with pytest.raises(DeviceError, match=rf"; or --kv int8 \({human_size(room)}\)"):
        settle(limited(room), [wanted])
    assert settle(limited(room), [wanted], None, notes.append).context < 32768
    assert notes[0].endswith("(all fit with --kv int8)")
    for plan, memory in ((wanted, room - 1), (dataclasses.replace(wanted, kv="int8"), room - 1)):
        assert not [other for other in nearest(plan, memory, precisions()) if other.kv != plan.kv]


def test_a_default_context_is_made_shorter_but_not_one_that_was_asked_for():
    wish = [Plan(SIX, BF16, 32768, 8)]
    notes: list[str] = []
    plan = settle(limited(18 * GB), wish, None, notes.append)
    assert plan.context < 32768 and plan.total <= 18 * GB
    assert f"context reduced to {plan.context:,} tokens" in notes[0]
    with pytest.raises(DeviceError) as error:
        settle(limited(18 * GB), wish)
    text = str(error.value)
    assert "--memory-limit allows 18.0 GB" in text and "32,768 tokens x 8" in text
    assert "--dtype bfloat16 --quantize int4" in text and f"--max-length {plan.context}" in text
    assert "--batch-size" in text and len(text.splitlines()) == 3
    with pytest.raises(DeviceError, match="a larger device is needed"):
        settle(limited(2 * GB), wish, None, notes.append)
    assert settle(Budget("a card", "gpu", None), wish).context == 32768


def test_precisions_by_flags_and_by_place():
    place = Budget("cpu", "cpu", 16 * GB)  # where float32 does not fit
    choices = place.precisions(None, "auto", None)
    wishes = [Plan(SIX, choice, 8192, platform="cpu") for choice in choices]
    assert settle(place, wishes).precision == BF16
    assert flags(BF16) == "--dtype bfloat16" and flags(INT8) == "--dtype bfloat16 --quantize int8"
    stored = Precision("float16", "int4-row")
    assert flags(stored, "int4-row") == "--dtype float16" and stored.name == "int4"
    assert flags(BF16, "int4-row") == "--dtype bfloat16 --quantize none"


# Where


def test_the_device_that_is_here(monkeypatch):
    gpu = Gpu("NVIDIA GeForce RTX 4090", 24 * GIB, 20 * GIB)
    monkeypatch.setattr(budget, "find_nvidia", lambda: Nvidia(gpus=(gpu,)))
    monkeypatch.setattr(budget, "_jax_may_use", lambda platform: True)
    found = find_budget("auto")
    assert (found.platform, found.memory, found.bandwidth) == ("gpu", 20 * GIB, 1.008e12)
    assert find_budget("cpu").platform == "cpu"
    assert find_budget("auto", 5 * GB).memory == 5 * GB
    monkeypatch.setattr(budget, "find_nvidia", Nvidia)
    monkeypatch.setattr(budget, "count_tpus", lambda: 4)
    assert find_budget("auto").platform == "tpu"


def test_cards_are_known_by_their_names():
    names = {
        "NVIDIA GeForce RTX 3090": "3090",
        "NVIDIA A100-SXM4-40GB": "a100",
        "NVIDIA A100 80GB PCIe": "a100-80",
        "NVIDIA L4": "l4",
        "TPU v5 lite": "v5e-1",
        "TPU v5": "v5p",
    }
    for kind, name in names.items():
        assert find_card(kind) is CARDS[name]
    for kind in ("NVIDIA GeForce RTX 3060 Ti", "NVIDIA L40", "cpu", ""):
        assert find_card(kind) is None


def test_the_share_of_a_gpu_comes_from_the_plan():
    gpu = Gpu("NVIDIA GeForce RTX 3090", 24 * GIB, 23 * GIB)
    here = Budget("a card", "gpu", 22 * GIB, present=gpu)
    plan = Plan(SIX, INT4, 8192)

    def share(plan: Plan, budget: Budget = here, name: str | None = None) -> dict[str, str]:
        environment = {} if name is None else {name: "x"}
        set_gpu_share(budget, plan, environment)
        return environment

    ((name, text),) = share(plan).items()
    assert name == "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert (plan.total - plan.runtime) / gpu.total < float(text) < 0.3
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        assert share(plan, name=name) == {name: "x"}  # the user's own
    (text,) = share(Plan(SIX, BF16, 32768, 64)).values()
    assert float(text) == pytest.approx(0.95, abs=0.002)
    assert share(plan, Budget("this processor", "cpu", GB)) == {}


# The sheet of a dry run


def sheet(budget=None, **options):
    budget = budget or find_budget("3090")
    return make_sheet("six", SIX, budget, contexts=(2048, 8192), batches=(1, 8), **options)


def test_a_plan_for_every_precision_context_and_batch():
    found = sheet()
    assert list(found.labels.values()) == ["float32", "bfloat16", "int8", "int4"]
    shapes = [(plan.context, plan.batch) for plan in found.plans]
    assert shapes == [(2048, 1), (2048, 8), (8192, 1), (8192, 8)] * 4
    plan = next(p for p in found.plans if p == Plan(SIX, INT8, 8192, 8))
    assert found.budget.fits(plan) and not found.budget.fits(found.plans[0])
    assert found.rate(plan) == rate_bound(plan, 936e9)
    assert found.longest["int8", 8] == largest_context(plan, found.budget.memory or 0)
    assert found.longest["float32", 1] == 0 and not found.nothing_fits
    assert sheet(find_budget("3090", 2 * GB)).nothing_fits


def test_flags_leave_fewer_precisions_open():
    assert set(sheet(dtype="float16").labels.values()) == {"float16"}
    assert set(sheet(quantize="int8").labels.values()) == {"int8"}
    stored = sheet(stored="int4-row").labels
    assert Precision("bfloat16", "int4-row") in stored and INT8 not in stored
    assert {plan.chunk for plan in sheet(chunk=512, columns=3).plans} == {512}


def text_of(sheet) -> str:
    return " ".join(" ".join(render(sheet, 100)).split())


def test_tables():
    text, plan = text_of(sheet()), Plan(SIX, INT8, 8192)
    assert "six, 6.24 billion parameters, on 3090: 24.5 GB to use, 936 GB/s" in text
    row = f"{plan.total / 1e9:.1f} GB yes {rate_bound(plan, 936e9):.0f}"
    assert "8,192 1 6.8 GB 234.9 MB" in text and row in text
    assert "longest context that fits, batch 8: float32 none, bfloat16" in text
    unknown = sheet(Budget("the TPU", "tpu", None))
    text = text_of(unknown)
    assert "memory unknown" in text and "bandwidth is not known here" in text and " ? ?" in text
    assert as_json(unknown)["fits"] is None and as_json(unknown)["longest_context"] == []
    spread = sheet(quantize="none", mesh=sizes_of({"tensor": 8}))
    text = text_of(spread)
    assert "on 8 devices (3090, tensor=8)" in text and "All sizes are those of each device" in text
    assert as_json(spread)["mesh"] == {"data": 1, "fsdp": 1, "tensor": 8}
    assert spread.plans[0].weights < Plan(SIX, BF16, 2048).weights / 7


# Before loading, and when it went wrong all the same


def test_what_cannot_fit_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(load, "open_choice", lambda *args, **kwargs: pytest.fail("loaded"))
    common = "--prompt", "x", "--compile-cache", "off", "--device", "cpu"
    with pytest.raises(DeviceError, match="--memory-limit allows 1.0 MB") as error:
        main([*common, "--memory-limit", "1MB", "--speculate", "7"])
    assert error.value.exit_code == 5 and "jax itself 400.0 MB" in error.value.what
    assert "--speculate 7" in error.value.what and "weights 4.7 MB" in error.value.what
    with pytest.raises(UsageError, match="--max-length must be from 2 to 1024, got 99999"):
        main([*common, "--max-length", "99999"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
    ],
)
def test_out_of_memory_while_loading_says_what_fits(monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(load, "load_checkpoint", full)
    with pytest.raises(DeviceError) as caught:
        infer.load(device="cpu")
    what, why, fix = str(caught.value).splitlines()
    assert what.startswith("out of device memory: loading") and caught.value.exit_code == 5
    assert "Needed: " in why and "free: " in why and str(error) in why
    assert fix.startswith("What fits: ") and "--dtype bfloat16" in fix
