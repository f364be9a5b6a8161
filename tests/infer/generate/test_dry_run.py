"""`--dry-run`: plans of memory as a table and as JSON."""

import argparse
import dataclasses
import json
import subprocess
import sys

import pytest

from convert.layouts.hf_config import native_config
from glm2_jax import PRESETS
from glm2_jax.cli import arguments
from glm2_jax.errors import CheckpointError, UsageError
from infer.engine.load import demo_folder
from infer.generate.__main__ import main, parser
from infer.memory.plan import Plan
from infer.memory.precision import Precision
from tests.support.paths import ROOT

GB = 10**9
SIX = PRESETS["chatglm2-6b"]


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


def test_flags_that_the_plan_leaves_out_are_named(capsys):
    assert main(["--dry-run", "--device", "3090", "--prompt", "x", "--adapter", "a"]) == 0
    assert "the plan is without --prompt, --adapter" in capsys.readouterr().err
