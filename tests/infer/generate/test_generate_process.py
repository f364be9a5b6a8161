"""`python -m infer.generate` as a process: imports, locales, signals, pipes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert import save_checkpoint
from glm2_jax import Tokenizer
from tests.support.engine_toy import TOY, toy_params
from tests.support.paths import ROOT
from tests.support.sp_model import sp_model

COMMAND = [sys.executable, "-m", "infer.generate"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "toy"
    save_checkpoint(path, TOY, toy_params(), Tokenizer.from_bytes(sp_model()), source="test")
    return ["--model", str(path), "--compile-cache", "off", "--greedy"]


@pytest.fixture
def endless(tmp_path):
    """A batch file that takes minutes."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "hi"}\n' * 50_000)
    return ["--batch-file", str(path)]


def start(*args: str, **kwargs) -> subprocess.Popen[str]:
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([*COMMAND, *args], cwd=ROOT, text=True, **(pipes | kwargs))


def wait_for_handlers(process: subprocess.Popen[str]) -> None:
    """Waits until the process has its signal handlers; before that it is Python that starts."""
    status = Path(f"/proc/{process.pid}/status")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        caught = next(line for line in status.read_text().splitlines() if "SigCgt" in line)
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


def test_help_and_usage_errors_do_not_wait_for_jax():
    code = (
        "import sys\n"
        "from infer.generate.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('jax' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)"
    )
    for flag, status in (("--help", 0), ("--nonsense", 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, flag], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == status
        assert done.stderr.splitlines()[-1] == "False False"


def test_output_is_utf8_whatever_the_locale_says(model):
    locale = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [*COMMAND, *model, "--json", "--max-new-tokens", "1"],
        cwd=ROOT,
        env=os.environ | locale,
        input="你好\n".encode(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert '"prompt": "你好"' in done.stdout.decode("utf-8")


def test_a_signal_ends_it_at_once(model, endless, tmp_path):
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    process = start(*model, *endless, "--max-new-tokens", "2", "--output", str(output))
    deadline = time.monotonic() + 120
    while not (journal.exists() and b'"answer"' in journal.read_bytes()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and out == ""
    assert err.splitlines()[-1] == "terminated" and "Traceback" not in err
    assert "to continue after a stop, run the same command" in err and not output.exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
def test_ctrl_c_while_importing_loading_compiling_and_reading(model, endless):
    for delay in (0.05, 0.7, 1.5):
        process = start(*model, *endless)
        wait_for_handlers(process)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err, (delay, err)
    process = start(*model, "--prompt", "-", stdin=subprocess.PIPE)
    wait_for_handlers(process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.communicate()[1] == "interrupted\n"


def test_a_reader_that_leaves_early_is_no_error_message(model, endless):
    process = start(*model, *endless, "--max-new-tokens", "2")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith('{"prompt": "hi"')
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    said = process.stderr.read().splitlines()
    told = [line for line in said if not line.endswith("s left")]  # progress, on a slow machine
    assert told[0] == "computing in float32"
    assert all(line.startswith("compiling ") for line in told[1:])
    process.stderr.close()


def test_expected_errors_have_no_traceback_unless_asked(tmp_path):
    for flags in ([], ["--debug"]):
        process = start("--model", str(tmp_path / "none"), "--prompt", "hi", *flags)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 4 and out == ""
        assert ("Traceback" in err) == bool(flags) and "directory not found" in err
