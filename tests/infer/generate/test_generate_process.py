"""`python -m infer.generate` as a process: kills, signals, pipes, locales, two at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert import save_checkpoint
from glm2_jax import Tokenizer
from infer.batching.batcher import Batcher
from infer.generate import __main__ as generate
from tests.support.engine_toy import TOY, toy_params
from tests.support.paths import ROOT
from tests.support.sp_model import sp_model

COMMAND = [sys.executable, "-m", "infer.generate"]
ROWS = 120


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


def whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def test_a_batch_that_is_killed_again_and_again(tmp_path):
    questions, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"id": n, "prompt": "你好，" * (1 + n * 7 % 9)}) for n in range(ROWS)]
    lines[3], lines[9] = "not JSON", ""
    questions.write_text("\n".join(lines), encoding="utf-8")
    flags = "--batch-size 4 --temperature 1 --max-new-tokens 12 --logprobs 1 --seed 5"
    command = ["--batch-file", str(questions), *flags.split()]
    command += ["--compile-cache", str(tmp_path / "cache"), "--output"]
    cached = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true"}
    uninterrupted = start(*command, str(tmp_path / "all"), env=cached)
    uninterrupted.communicate()
    assert uninterrupted.returncode == 3
    expected = (tmp_path / "all").read_bytes()

    journal = tmp_path / "out.jsonl.partial"
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        before = whole_lines(journal)
        process = start(*command, str(output), env=cached)
        deadline = time.monotonic() + 240
        while len(whole_lines(journal)) < len(before) + 8:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signum)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code
        after = whole_lines(journal)
        assert after[: len(before)] == before and len(set(after)) == len(after)  # nothing lost
        numbers = [json.loads(line)["line"] for line in after[1:]]
        assert len(set(numbers)) == len(numbers) < ROWS - 2
        found = f"continuing: {len(before) - 1} of {ROWS - 2} answered already"
        assert (found in said) == bool(before) and "Traceback" not in said
        assert "run the same command" in said and not output.exists()

    done = start(*command, str(output), env=cached)
    _, said = done.communicate()
    assert done.returncode == 3 and f"{ROWS - 2} answered, 1 bad lines" in said
    assert f"{questions}:4: not JSON" in said and output.read_bytes() == expected
    ids = [json.loads(line)["id"] for line in expected.splitlines()]
    assert ids == [n for n in range(ROWS) if n not in (3, 9)]
    names = [*("all", "cache", "in.jsonl", "out.jsonl")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_two_processes_go_on_with_what_one_left(tmp_path, monkeypatch):
    questions, ours, theirs = (str(tmp_path / name) for name in ("in", "ours", "theirs"))
    prompts = ["你好", "你是谁？", "Who are you?", "1+1=?", "再见"]
    Path(questions).write_text("".join(f"{json.dumps({'prompt': text})}\n" for text in prompts))
    flags = "--dtype float32 --layers list --batch-size 2 --max-new-tokens 8"
    command = ["--batch-file", questions, *flags.split()]
    assert generate.main([*command, "--output", ours]) == 0
    step = Batcher.step

    def killed(self):
        if self.ended == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Batcher, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        generate.main([*command, "--output", theirs])
    launch = ["-m", "infer.launch", "--num-processes", "2", "--devices-per-process", "1", "--"]
    again = [*launch, *COMMAND, *command, "--mesh", "data=2", "--output", theirs]
    done = subprocess.run(
        [sys.executable, *again], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "continuing: 2 of 5 answered already" in done.stderr
    assert "5 answered, 0 bad lines" in done.stderr and done.stdout == ""
    assert Path(theirs).read_bytes() == Path(ours).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["in", "ours", "theirs"]


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


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
def test_ctrl_c_while_loading_compiling_and_reading_a_prompt(model, endless):
    for delay, flags in ((0.3, endless), (1.5, endless), (1, ["--prompt", "-"])):
        process = start(*model, *flags, stdin=subprocess.PIPE)
        status = Path(f"/proc/{process.pid}/status")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:  # before it has its handlers, it is Python that starts
            caught = next(line for line in status.read_text().splitlines() if "SigCgt" in line)
            if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
                break
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err, (delay, err)
    assert err == "interrupted\n"


def test_a_reader_that_leaves_early_is_no_error_message(model, endless):
    process = start(*model, *endless, "--max-new-tokens", "2")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith('{"prompt": "hi"')
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    said = process.stderr.read().splitlines()
    messages = [line for line in said if not line.endswith("s left")]  # progress, on a slow machine
    assert messages[0] == "computing in float32"
    assert all(line.startswith("compiling ") for line in messages[1:])
    process.stderr.close()
