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


@pytest.fixture
def dry(capsys):
    """Runs a dry run; gives the exit code and what it prints, without line breaks."""

    def dry(*args: str) -> tuple[int, str, str]:
        code = main(["--dry-run", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return dry


@pytest.mark.parametrize("columns", [44, 200])
def test_the_table_fits_the_terminal(columns, dry, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    more = "--prompt", "x", "--adapter", "a"
    code, out, err = dry("--config", "chatglm2-6b", "--device", "3090", *more)
    assert code == 0 and max(map(len, out.splitlines())) <= columns
    text = " ".join(out.split())
    for words in ("24.5 GB to use, 936 GB/s", "not a measurement", "bfloat16 32,768"):
        assert words in text
    assert all(name in out for name in ("float32", "bfloat16", "int8", "int4"))
    assert "the plan is without --prompt, --adapter" in err


def test_the_json_has_the_same_plans(dry):
    flags = "--config", "chatglm3-6b", "--device", "h200", "--json", "--max-length", "4096"
    code, out, _ = dry(*flags)
    found = json.loads(out)
    assert code == 0 and found["fits"] is True and found["bandwidth"] == 4.8e12
    assert len(found["plans"]) == 4 * 2
    plan = next(p for p in found["plans"] if (p["quantize"], p["batch"]) == ("int8", 8))
    want = Plan(PRESETS["chatglm3-6b"], Precision("bfloat16", "int8"), 4096, 8)
    assert plan["total"] == want.total and plan["weights"] == want.weights
    assert plan["tokens_per_second_bound"] > 1000 and plan["speculate"] == 0


def test_nothing_fits_is_an_exit_code(dry):
    flags = "--config", "chatglm2-6b", "--device", "t4"
    code, out, _ = dry(*flags, "--memory-limit", "3")
    assert code == 5 and "int4 none" in " ".join(out.split())
    code, out, _ = dry(*flags, "--dtype", "fp16", "--quantize", "int4")
    assert code == 0 and "float16" not in out.split("longest")[0] and "bfloat16" not in out


def test_a_config_file_and_a_folder(tmp_path, dry):
    file = tmp_path / "config.json"
    config = dataclasses.replace(PRESETS["chatglm2-6b"], num_layers=2, seq_length=1024)
    flags, native = ("--device", "4090", "--json"), native_config(config, "float16", (2,))
    found = []
    for written in (config.to_hf(), native):
        file.write_text(json.dumps(written))
        code, out, _ = dry("--config", str(file), *flags)
        found.append(json.loads(out))
        assert code == 0 and {p["context"] for p in found[-1]["plans"]} == {1024}
    assert found[0] == found[1]
    code, out, _ = dry("--model", str(demo_folder()), *flags)
    assert code == 0 and json.loads(out)["parameters"] == 2337600
    for bad in (json.dumps(native | {"attention_bias": False}), "[]", "{"):
        file.write_text(bad)
        with pytest.raises(CheckpointError, match="attention_bias|JSON|be parsed"):
            dry("--config", str(file))
    with pytest.raises(CheckpointError):
        dry("--config", str(tmp_path))


def test_flags_that_do_not_go_together():
    text = " ".join(parser().format_help().split())
    assert "--dry-run" in text and "v5e-1" in text and "not measured" in text
    for flags, what in (
        (["--config", "chatglm2-6b", "--prompt", "x"], "--config needs --dry-run"),
        (["--device", "3090", "--prompt", "x"], "--device 3090 needs --dry-run"),
        (["--dry-run", "--config", "chatglm2-6b", "--model", "x"], "each name a model"),
        (["--dry-run", "--max-length", "40000"], "must be from 2 to 32768, got 40000"),
        (["--dry-run", "--max-length", "0"], "--max-length must be a whole number"),
        (["--dry-run", "--max-length", "1"], "must be from 2 to 32768, got 1"),
        (["--dry-run", "--config", "chatglm2-6b-int4", "--quantize", "int8"], "quantized already"),
    ):
        with pytest.raises(UsageError, match=what):
            main(flags)


def test_weights_that_differ_in_their_dtype_alone_are_told_apart(dry, monkeypatch):
    flags = ["--config", "chatglm2-6b", "--device", "cpu", "--memory-limit", "64"]
    flags += ["--quantize", "int4", "--quantize-embeddings"]
    names = {f"{dtype}:int4+embeddings" for dtype in ("float32", "bfloat16")}
    for columns in ("60", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        _, out, _ = dry(*flags)
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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "jax[tpu]" in done.stdout, done.stderr


def test_sizes_of_memory():
    assert arguments.memory_size("8") == 8 * GB and arguments.memory_size("1.5") == 1.5 * GB
    assert arguments.memory_size("500 MB") == 5e8 and arguments.memory_size("1GiB") == 2**30
    for bad in ("", "x", "-1", "0", "nan", "inf", "1e99"):
        with pytest.raises(argparse.ArgumentTypeError, match=repr(bad)):
            arguments.memory_size(bad)
