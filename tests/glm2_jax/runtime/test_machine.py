"""The facts about a machine: what the system says, what jax does, and the dtype that suits it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from glm2_jax import UsageError
from glm2_jax.runtime import dtypes, machine
from glm2_jax.runtime.dtypes import resolve_dtype
from glm2_jax.runtime.host_memory import Memory, find_memory
from glm2_jax.runtime.machine import Cache, Gpu, Nvidia

GB = 10**9


def test_the_answer_of_nvidia_smi():
    text = "550.54.15, 40960, 40000, NVIDIA A100\n550.54.15, [N/A], [N/A], NVIDIA GH200, 480GB\n"
    gpus = (Gpu("NVIDIA A100", 40960 * 2**20, 40000 * 2**20), Gpu("NVIDIA GH200, 480GB", 0, 0))
    assert machine.parse_nvidia_smi(text) == Nvidia(driver="550.54.15", gpus=gpus)
    found = machine.parse_nvidia_smi("No devices were found\n")
    assert found == Nvidia(smi_error="nvidia-smi lists no GPU")


def test_hardware_without_tools(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda tool: None)
    version = "proc/driver/nvidia/version"
    files = {
        version: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19",
        "dev/nvidia0": "",
        "dev/nvidiactl": "",
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
        "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",  # its sound device
        "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",
        "sys/bus/pci/devices/0000:02:00.0/vendor": "0x1ae0\n",
        "sys/bus/pci/devices/0000:02:00.0/class": "0x120000\n",
        "sys/bus/pci/devices/0000:02:00.0/device": "0x0063\n",
    }
    write(tmp_path, files)
    assert machine.find_nvidia(tmp_path) == Nvidia(on_bus=1, nodes=1, driver="535.129.03")
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release"
    write(tmp_path, {version: line})
    assert machine.find_nvidia(tmp_path).driver == "570.86"
    assert machine.count_tpus(tmp_path) == 1


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   8000000 kB\n"


def test_control_groups_limit_memory(tmp_path):
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert find_memory(tmp_path) == Memory(16384000000, 8192000000)
    group = "sys/fs/cgroup/kubepods/pod1"
    second = {
        "proc/self/cgroup": "0::/kubepods/pod1/inner\n",
        "sys/fs/cgroup/kubepods/memory.max": "max\n",
        f"{group}/memory.max": "4000000000\n",
        f"{group}/memory.current": "3000000000\n",
        f"{group}/memory.stat": "anon 5\ninactive_file 1000000000\n",
    }
    write(tmp_path / "v2", {"proc/meminfo": MEMINFO, **second})
    found = find_memory(tmp_path / "v2")
    assert (found.limit, found.limit_left, found.usable) == (4 * GB, 2 * GB, 2 * GB)
    first = {
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000000\n",
        "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "9223372036854771712\n",
    }
    write(tmp_path / "v1", {"proc/meminfo": MEMINFO, **first})
    found = find_memory(tmp_path / "v1")
    assert (found.limit, found.limit_left) == (2 * GB, 1_500_000_000)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print('stage find devices', flush=True); import os; os.abort()", "crashed with signal 6"),
        ("import time; time.sleep(600)", "no answer within"),
        ("raise RuntimeError('Unable to initialize backend')", "Unable to initialize backend"),
    ],
)
def test_jax_may_crash_or_hang(code, error):
    found = machine.probe_jax(code=code, seconds=1 if "sleep" in code else 120)
    assert error in found.error and not found.works
    if "abort" in code:
        assert "(at: find devices)" in found.error


def test_what_jax_says_is_shortened():
    log = (
        "Traceback (most recent call last):\n  File x\n"
        "WARNING:2026-01-01 10:00:00,1:jax._src.xla_bridge:794: An NVIDIA GPU may be present\n"
        "E0101 10:00:00.1 12 cuda_executor.cc:1] no driver\n" * 2 + "-" * 20 + "\n"
        "For simplicity, JAX has removed its internal frames from the traceback of the following\n"
    )
    assert machine.important_lines(log) == ("An NVIDIA GPU may be present", "no driver")


def test_free_space_and_cache(tmp_path, monkeypatch):
    assert (machine.free_space(str(tmp_path / "not" / "there")) or 0) > 0
    monkeypatch.setenv("GLM2_JAX_COMPILE_CACHE", str(tmp_path / "xla"))
    assert machine.find_cache() == Cache(str(tmp_path / "xla"))
    write(tmp_path, {"xla/program-cache": "12345", "xla/other": "1"})
    assert machine.find_cache() == Cache(str(tmp_path / "xla"), True, True, 1, 5)
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert not machine.find_cache().writable
    monkeypatch.setenv("GLM2_JAX_COMPILE_CACHE", "off")
    assert machine.find_cache() == Cache("off")


def test_names_of_dtypes():
    for name, expected in (("bf16", "bfloat16"), ("half", "float16"), ("float32", "float32")):
        assert resolve_dtype(name, num_params=1).name == expected
    with pytest.raises(UsageError, match="float64"):
        resolve_dtype("float64", num_params=1)


@pytest.mark.parametrize(
    ("platform", "capability", "free", "expected"),
    [
        ("tpu", None, 0, "bfloat16"),
        ("gpu", "8.0", 0, "bfloat16"),
        ("gpu", "7.5", 0, "float16"),
        ("gpu", "gfx90a", 0, "bfloat16"),
        ("cpu", None, 24 * GB, "bfloat16"),
        ("cpu", None, 28 * GB, "float32"),
    ],
)
def test_the_dtype_that_suits_a_device(platform, capability, free, expected, monkeypatch):
    assert 2**28 < dtypes.available_memory() < 2**50
    monkeypatch.setattr(dtypes, "available_memory", lambda: free)
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert resolve_dtype("auto", num_params=6_243_584_000, device=device).name == expected
