"""Out of memory on the real command line: exit code 5 with numbers and advice.

The allocator is capped by RLIMIT_AS from a stage on: XLA:CPU then reports RESOURCE_EXHAUSTED for
weights and for what a program needs, as a GPU would.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from convert.random import official_config, write_random
from glm2_jax.runtime.host_memory import find_memory
from infer.engine.load import demo_folder
from tests.support.paths import ROOT
from tests.support.toy import TOY

resource = pytest.importorskip("resource", reason="this system has no limits of a process")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

# python -c DRIVER STAGE flags: `infer.generate` that runs out of memory at a stage.
DRIVER = """
import re, resource, sys
from pathlib import Path
from glm2_jax.cli import interrupt
from infer.engine import load as loading
from infer.engine import programs
from infer.generate.__main__ import main

stage = sys.argv.pop(1)
loads = stage == "load"
owner, name = (loading, "load_checkpoint") if loads else (programs.Programs, "call")
real = getattr(owner, name)

def capped(*args, **kwargs):
    if loads or args[1] == stage:  # from now on 60 MB more than there is
        status = Path("/proc/self/status").read_text()
        size = int(re.search(r"VmSize:\\s+(\\d+)", status)[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (size + 60_000_000,) * 2)
    return real(*args, **kwargs)

setattr(owner, name, capped)
interrupt.run(main)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Small but for its vocabulary, which fills memory at loading, and its heads, at prefill."""
    folder = tmp_path_factory.mktemp("random")
    config = TOY.to_hf() | {
        "num_layers": 1,
        "padded_vocab_size": 65024,
        "hidden_size": 256,
        "ffn_hidden_size": 256,
        "num_attention_heads": 32,
        "multi_query_group_num": 2,
        "kv_channels": 8,
        "seq_length": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    raw = official_config(str(folder / "config.json"))
    write_random(folder / "model", raw, demo_folder())
    return folder / "model"


def generate(*args: str) -> subprocess.CompletedProcess:
    """The command in a process of its own; its device is the CPU, and it keeps nothing."""
    command = [*args, "--device", "cpu", "--compile-cache", "off", "--greedy", "--dtype", "fp32"]
    # glibc reserves address space for each thread that allocates, which a cap counts.
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def aborted(done: subprocess.CompletedProcess) -> bool:
    """Return whether native code ended the process, as it may where it gets no memory."""
    by_glibc = done.returncode == 127 and done.stderr.endswith(": ABORT\n")
    return by_glibc or done.returncode == -signal.SIGABRT


@pytest.mark.parametrize("stage", ["load", "prefill"])
def test_memory_that_runs_out(stage, model, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("你好" * 700, encoding="utf-8")
    flags = "--model", str(model), "--prompt-file", str(prompt), "--max-new-tokens", "2"
    for _ in range(3):
        done = generate(sys.executable, "-c", DRIVER, stage, *flags)
        if not aborted(done):
            break
    assert done.returncode == 5, done.stderr
    what, why, fix = done.stderr.splitlines()[-3:]
    doing = "loading " if stage == "load" else "a prompt of "
    assert what.startswith(f"error: out of device memory: {doing}")
    assert re.search(r"Needed: [\d.]+ .B for .*; free: [\d.]+ ", why)
    assert fix.startswith(("What fits: --", "This model does not fit in any precision"))
    assert "Traceback" not in done.stderr and not done.stdout.strip()
    said = "RESOURCE_EXHAUSTED", "Unable to allocate", "Cannot allocate", "cannot be read", "Out of"
    assert any(text in done.stderr for text in said), done.stderr


def test_limits_under_which_the_compiler_would_end_the_process_are_refused_before():
    code = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (400_000_000,) * 2)\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    done = generate(sys.executable, "-c", code, "-m", "infer.generate", "--prompt", "x")
    assert done.returncode == 5 and "compiling" not in done.stderr, done.stderr
    what, why, _ = done.stderr.splitlines()[-3:]
    assert what.startswith("error: not enough memory: ") and "weights 9.4 MB" in what
    assert why == "Free on this processor: 400.0 MB."


def test_after_a_failure_what_the_process_has_counts_as_free(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 1000 kB\n")
    (tmp_path / "proc/self/status").write_text("VmRSS:\t 6000 kB\nRssAnon:\t 5000 kB\n")
    assert find_memory(tmp_path).usable == 1000 * 1024
    assert find_memory(tmp_path, own=True).usable == 6000 * 1024


def test_limits_of_the_process_count(monkeypatch):
    infinity = resource.RLIM_INFINITY
    limits = {resource.RLIMIT_AS: infinity, resource.RLIMIT_DATA: infinity}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], infinity))
    assert find_memory().process_limit is None
    limits[resource.RLIMIT_DATA] = 4_000_000_000
    assert find_memory().process_limit == 4_000_000_000
    limits[resource.RLIMIT_AS] = 5_000_000_000  # less the address space that libraries map
    assert find_memory().process_limit == 3_500_000_000
    limits[resource.RLIMIT_AS] = 1_000_000_000
    assert find_memory().process_limit == find_memory().usable == 0
