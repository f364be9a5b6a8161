"""What fits into memory: the check at the start, and errors of too little memory."""

import jax
import pytest

import infer
from glm2_jax import PRESETS
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import DeviceError, UsageError
from glm2_jax.runtime.machine import Gpu, Nvidia
from infer.engine import load
from infer.engine.load import demo_folder
from infer.generate.__main__ import main, parser
from infer.memory import budget
from infer.memory.budget import Budget, set_gpu_share, settle
from infer.memory.plan import Plan
from infer.memory.precision import Precision

GB = 10**9
SIX = PRESETS["chatglm2-6b"]
BF16 = Precision("bfloat16")


def test_drafts_are_in_the_check_of_the_start(monkeypatch):
    wishes: list[Plan] = []
    monkeypatch.setattr(budget, "settle", lambda _, plans, *__: wishes.extend(plans) or 1 / 0)
    for flags, columns in (((), 1), (("--speculate", "7"), 8)):
        args = parser().parse_args(["--prompt", "x", "--device", "cpu", *flags])
        with pytest.raises(ZeroDivisionError):
            choice, options = from_flags(ModelChoice, args), from_flags(EngineOptions, args)
            budget.prepare(choice, options, demo_folder())
        assert wishes.pop().columns == columns


def test_what_cannot_fit_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(load, "open_choice", lambda *args, **kwargs: pytest.fail("loaded"))
    common = "--prompt", "x", "--compile-cache", "off", "--device", "cpu"
    with pytest.raises(DeviceError, match="--memory-limit allows 1.0 MB") as error:
        main([*common, "--memory-limit", "1MB"])
    assert error.value.exit_code == 5 and "weights 4.7 MB" in error.value.what
    assert "jax itself 400.0 MB" in error.value.what
    with pytest.raises(UsageError, match="--max-length must be at most 1024, got 99999"):
        main([*common, "--max-length", "99999"])


def limited(memory: int) -> Budget:
    return Budget("a card", "gpu", memory, limited=True)


def test_a_default_context_is_made_shorter_but_not_one_that_was_asked_for():
    wish = [Plan(SIX, BF16, 32768, 8)]
    told: list[str] = []
    plan = settle(limited(18 * GB), wish, None, told.append)
    assert plan.context < 32768 and plan.total <= 18 * GB
    assert f"context reduced to {plan.context:,} tokens" in told[0]
    with pytest.raises(DeviceError) as error:
        settle(limited(18 * GB), wish)
    text = str(error.value)
    assert "--memory-limit allows 18.0 GB" in text and "32,768 tokens x 8" in text
    assert "--dtype bfloat16 --quantize int4" in text and f"--max-length {plan.context}" in text
    assert "--batch-size" in text and len(text.splitlines()) == 3
    with pytest.raises(DeviceError, match="a larger device is needed"):
        settle(limited(2 * GB), wish, None, told.append)
    assert settle(Budget("a card", "gpu", None), wish).context == 32768


def test_float32_gives_way_where_it_does_not_fit():
    choices = Budget("cpu", "cpu", 16 * GB).precisions(None, "auto", None)
    wishes = [Plan(SIX, choice, 8192, platform="cpu") for choice in choices]
    assert settle(Budget("cpu", "cpu", 16 * GB), wishes).precision == BF16


def test_the_share_of_a_gpu_comes_from_the_plan():
    gpu = Gpu("NVIDIA GeForce RTX 3090", 24 * 2**30, 23 * 2**30)
    here = Budget("a card", "gpu", 22 * 2**30, present=gpu)
    plan = Plan(SIX, Precision("bfloat16", "int4"), 8192)

    def share(plan: Plan, budget: Budget = here, **environment: str) -> dict[str, str]:
        set_gpu_share(budget, plan, environment)
        return environment

    ((name, text),) = share(plan).items()
    assert name == "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert (plan.total - plan.runtime) / gpu.total < float(text) < 0.3
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        assert share(plan, **{name: "x"}) == {name: "x"}  # the user's own
    (text,) = share(Plan(SIX, BF16, 32768, 64)).values()
    assert float(text) == pytest.approx(0.95, abs=0.002)
    assert share(plan, Budget("this processor", "cpu", GB)) == {}


def test_the_device_that_is_here(monkeypatch):
    gpu = Gpu("NVIDIA GeForce RTX 4090", 24 * 2**30, 20 * 2**30)
    monkeypatch.setattr(budget, "find_nvidia", lambda: Nvidia(gpus=(gpu,)))
    monkeypatch.setattr(budget, "_jax_may_use", lambda platform: True)
    found = budget.find_budget("auto")
    assert (found.platform, found.memory, found.bandwidth) == ("gpu", 20 * 2**30, 1.008e12)
    assert budget.find_budget("cpu").platform == "cpu"
    assert budget.find_budget("auto", 5 * GB).memory == 5 * GB
    monkeypatch.setattr(budget, "find_nvidia", Nvidia)
    monkeypatch.setattr(budget, "count_tpus", lambda: 4)
    assert budget.find_budget("auto").platform == "tpu"


def test_out_of_memory_while_loading_says_what_fits(monkeypatch):
    for error in (
        MemoryError("Unable to allocate 9 GiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
    ):

        def full(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(load, "load_checkpoint", full)
        with pytest.raises(DeviceError) as caught:
            infer.load(device="cpu")
        what, why, fix = str(caught.value).splitlines()
        assert what.startswith("out of device memory: loading") and caught.value.exit_code == 5
        assert "Needed: " in why and "free: " in why and str(error) in why
        assert fix.startswith("What fits: ") and "--dtype bfloat16" in fix
