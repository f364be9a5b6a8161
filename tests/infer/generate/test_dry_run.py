"""`--dry-run`, `--memory-limit`, and errors of too little memory."""

import argparse
import dataclasses
import json
import subprocess
import sys

import jax
import pytest

import infer
from convert.layouts.hf_config import native_config
from glm2_jax import PRESETS
from glm2_jax.cli import arguments
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import CheckpointError, DeviceError, UsageError
from glm2_jax.runtime.machine import Gpu, Nvidia
from infer.engine import load
from infer.engine.load import demo_folder
from infer.generate.__main__ import main, parser
from infer.memory import budget
from infer.memory.budget import Budget, set_gpu_share, settle
from infer.memory.plan import Plan
from infer.memory.precision import Precision
from tests.support.paths import ROOT

GB = 10**9
SIX = PRESETS["chatglm2-6b"]
BF16 = Precision("bfloat16")


def dry(capsys, *args: str) -> tuple[int, str]:
    code = main(["--dry-run", *args])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("columns", [44, 200])
def test_the_table_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out = dry(capsys, "--config", "chatglm2-6b", "--device", "3090")
    assert code == 0 and max(map(len, out.splitlines())) <= columns
    assert "24.5 GB to use, 936 GB/s" in " ".join(out.split())
    assert "not a measurement" in " ".join(out.split())
    assert "bfloat16 32,768" in " ".join(out.split())
    for name in ("float32", "bfloat16", "int8", "int4"):
        assert name in out


def test_the_json_has_the_same_plans(capsys):
    code, out = dry(
        capsys, "--config", "chatglm3-6b", "--device", "h200", "--json", "--max-length", "4096"
    )
    found = json.loads(out)
    assert code == 0 and found["fits"] is True and found["bandwidth"] == 4.8e12
    assert len(found["plans"]) == 4 * 2
    plan = next(p for p in found["plans"] if (p["quantize"], p["batch"]) == ("int8", 8))
    want = Plan(PRESETS["chatglm3-6b"], Precision("bfloat16", "int8"), 4096, 8)
    assert plan["total"] == want.total and plan["weights"] == want.weights
    assert plan["tokens_per_second_bound"] > 1000 and plan["speculate"] == 0


def test_drafts_are_in_the_check_of_the_start(monkeypatch):
    wishes: list[Plan] = []
    monkeypatch.setattr(budget, "settle", lambda _, plans, *__: wishes.extend(plans) or 1 / 0)
    for flags, columns in (((), 1), (("--speculate", "7"), 8)):
        args = parser().parse_args(["--prompt", "x", "--device", "cpu", *flags])
        with pytest.raises(ZeroDivisionError):
            choice, options = from_flags(ModelChoice, args), from_flags(EngineOptions, args)
            budget.prepare(choice, options, demo_folder())
        assert wishes.pop().columns == columns


def test_nothing_fits_is_an_exit_code(capsys):
    code, out = dry(capsys, "--config", "chatglm2-6b", "--device", "t4", "--memory-limit", "3")
    assert code == 5 and "int4 none" in " ".join(out.split())
    code, out = dry(
        capsys, "--config", "chatglm2-6b", "--device", "t4", "--dtype", "fp16", "--quantize", "int4"
    )
    assert code == 0 and "float16" not in out.split("longest")[0] and "bfloat16" not in out


def test_a_config_file_and_a_folder(tmp_path, capsys):
    file = tmp_path / "config.json"
    config = dataclasses.replace(SIX, num_layers=2, seq_length=1024)
    flags, native = ("--device", "4090", "--json"), native_config(config, "float16", (2,))
    found = []
    for written in (config.to_hf(), native):
        file.write_text(json.dumps(written))
        code, out = dry(capsys, "--config", str(file), *flags)
        found.append(json.loads(out))
        assert code == 0 and {p["context"] for p in found[-1]["plans"]} == {1024}
    assert found[0] == found[1]
    code, out = dry(capsys, "--model", str(demo_folder()), *flags)
    assert code == 0 and json.loads(out)["parameters"] == 2337600
    for bad in (json.dumps(native | {"attention_bias": False}), "[]", "{"):
        file.write_text(bad)
        with pytest.raises(CheckpointError, match="attention_bias|JSON|be parsed"):
            main(["--dry-run", "--config", str(file)])
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError):
            main(["--dry-run", "--config", str(path)])


def test_flags_that_do_not_go_together():
    text = " ".join(parser().format_help().split())
    assert "--dry-run" in text and "v5e-1" in text and "not measured" in text
    with pytest.raises(UsageError, match="--config needs --dry-run"):
        main(["--config", "chatglm2-6b", "--prompt", "x"])
    with pytest.raises(UsageError, match="--device 3090 needs --dry-run"):
        main(["--device", "3090", "--prompt", "x"])
    with pytest.raises(UsageError, match="each name a model"):
        main(["--dry-run", "--config", "chatglm2-6b", "--model", "x"])
    with pytest.raises(UsageError, match="must be at most 32768"):
        main(["--dry-run", "--config", "chatglm2-6b", "--max-length", "40000"])
    for flags, what in (
        (["--max-length", "0"], "max_length"),
        (["--max-length", "1"], "--max-length must be at least 2"),
        (["--config", "chatglm2-6b-int4", "--quantize", "int8"], "quantized already"),
    ):
        with pytest.raises(UsageError, match=what):
            main(["--dry-run", *flags])


def test_weights_that_differ_in_their_dtype_alone_are_told_apart(capsys, monkeypatch):
    flags = ["--config", "chatglm2-6b", "--device", "cpu", "--memory-limit", "64"]
    flags += ["--quantize", "int4", "--quantize-embeddings"]
    names = {f"{dtype}:int4+embeddings" for dtype in ("float32", "bfloat16")}
    for columns in ("60", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        _, out = dry(capsys, *flags)
        assert max(map(len, out.splitlines())) <= int(columns) and all(n in out for n in names)
    table = out.split("\n\n")[1].splitlines()
    assert {line.split()[0] for line in table[1:]} == names and len(set(map(len, table))) == 1


def test_no_device_is_started():
    code = (
        "import sys\nfrom infer.generate.__main__ import main\n"
        "from infer.memory import compiler\n"
        "compiler.installed = lambda: False\n"
        "code = main(['--dry-run', '--config', 'chatglm2-6b', '--device', 'v5e-1'])\n"
        "assert 'jax' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_sizes_of_memory():
    assert arguments.memory_size("8") == 8 * GB and arguments.memory_size("1.5") == 1.5 * GB
    assert arguments.memory_size("500 MB") == 5e8 and arguments.memory_size("1GiB") == 2**30
    for bad in ("", "x", "-1", "0", "nan", "inf", "1e99"):
        with pytest.raises(argparse.ArgumentTypeError, match=repr(bad)):
            arguments.memory_size(bad)


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
    environment: dict[str, str] = {}
    share = set_gpu_share(here, plan, environment)
    assert share is not None and environment == {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}"}
    assert (plan.total - plan.runtime) / gpu.total < share < 0.3
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        environment = {name: "x"}  # the user's own
        assert set_gpu_share(here, plan, environment) is None and environment == {name: "x"}
    large = Plan(SIX, BF16, 32768, 64)
    assert set_gpu_share(here, large, {}) == pytest.approx(0.95, abs=0.002)
    assert set_gpu_share(Budget("this processor", "cpu", GB), plan, {}) is None


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
