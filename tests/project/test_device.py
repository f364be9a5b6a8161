"""`benchmarks/device.py`: every step works, and no step, signal or kill loses what was measured."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
FAKE = """
import os, pathlib, signal, sys, time
what, *ready = sys.argv[1:]
print('{"output_ids": [1, 2]}', flush=True)
if what == "fails":
    sys.exit("no such | device")
for file in ready:  # then it hangs, until it is ended or nobody waits for it
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = os.getppid()
    pathlib.Path(file).touch()
    while os.getppid() == parent:
        time.sleep(0.05)
"""


@pytest.fixture
def device(monkeypatch, tmp_path):
    """The module, and a command `fake` for its steps."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import device

    (tmp_path / "fake.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return device


def outcomes(path) -> list[str]:
    return [step["outcome"] for step in json.loads(path.read_text("utf-8"))["steps"]]


def test_steps_with_tiny_shapes(tmp_path):
    """On a CPU, however busy it is; without `--only` all of them take a minute and a half."""
    output = tmp_path / "device.json"
    command = [sys.executable, BENCHMARKS / "device.py"]
    flags = ["--small", "--device", "cpu", "--minutes", "120", "--output", output]
    for part in ("machine", "limits", "decode, int4", "tests"):
        flags += ["--only", part]
    done = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True)
    record = json.loads(output.read_text("utf-8"))
    failed = [step for step in record["steps"] if step["outcome"] != "done"]
    assert not failed and done.returncode == 0, (failed, done.stderr)
    assert all(step["results"] for step in record["steps"])
    for part in (
        "| products, bfloat16 |", "| decode 2 at 8, int4 |", "| tests | 1 passed |",
        "% of the bandwidth",
    ):  # fmt: skip
        assert part in done.stdout, part
    again = subprocess.run([*command, "--table", output], capture_output=True, text=True)
    assert again.stdout == done.stdout


def test_a_step_that_fails_or_hangs_is_recorded_and_the_next_one_starts(
    device, monkeypatch, tmp_path
):
    """Each step that hangs takes an hour of a clock that it sets itself."""
    ready = [tmp_path / "one", tmp_path / "two"]
    clock = SimpleNamespace(
        monotonic=lambda: 3600.0 * sum(file.exists() for file in ready), sleep=time.sleep
    )
    monkeypatch.setattr(device, "time", clock)
    monkeypatch.setattr(device, "GRACE", 1.0)
    commands = "done", "fails", f"hangs {ready[0]}", f"stubborn {ready[1]}", "done"
    run = device.Run(tmp_path / "device.json", 7200, {"device": "cpu"})
    run.take([(what.split()[0], 60, f"fake {what}") for what in commands])
    assert outcomes(run.output) == [
        device.DONE, device.FAILED, device.CUT, device.CUT, device.NOT_STARTED
    ]  # fmt: skip
    steps = run.record["steps"]
    assert [step.get("exit_code") for step in steps] == [0, 1, -15, -9, None]
    assert all(step["results"] == [{"output_ids": [1, 2]}] for step in steps[:4])
    assert steps[1]["last_lines"] == ["no such | device"]
    assert "| last line | no such \\| device |" in device.table(run.record)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_keeps_what_it_has(device, tmp_path, signum):
    ready, output = tmp_path / "ready", tmp_path / "device.json"
    steps = [("one", 60, "fake done"), ("two", 3600, f"fake hangs {ready}"), ("three", 60, "fake")]
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import device\n"
        f"device.plan = lambda *rest: {steps!r}\n"
        f"sys.exit(device.main(['--minutes', '90', '--output', {str(output)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signum)
    out, _ = process.communicate()
    killed = signum == signal.SIGKILL
    assert process.returncode == (-signum if killed else 128 + signum)
    rest = [device.RUNNING] if killed else [device.INTERRUPTED, device.NOT_STARTED]
    assert outcomes(output) == [device.DONE, *rest]
    assert ("| two | interrupted, " in out) is not killed


def test_a_kill_while_writing_leaves_the_old_file(device, monkeypatch, tmp_path):
    run = device.Run(tmp_path / "device.json", 3600, {"device": "cpu"})
    run.take([("one", 60, "fake done")])
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.take([("two", 60, "fake done")])
    assert outcomes(run.output) == [device.DONE]


def test_results_are_not_overwritten(device, tmp_path, capsys):
    output = tmp_path / "device.json"
    output.write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        device.main(["--output", str(output)])
    assert "exists" in capsys.readouterr().err and output.read_text("utf-8") == "{}"


def test_the_named_tests_exist(device):
    for name in device.REAL["tests"].split():
        path, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / path).read_text("utf-8")
