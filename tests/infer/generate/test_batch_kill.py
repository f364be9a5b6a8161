"""`--batch-file` killed again and again, as a process, with the bundled demo model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.paths import ROOT

ROWS = 120
FLAGS = [
    *("--batch-size", "4", "--temperature", "1", "--max-new-tokens", "12", "--logprobs", "1"),
    *("--seed", "5"),
]


def write_questions(path: Path) -> None:
    lines = [json.dumps({"id": n, "prompt": "你好，" * (1 + n * 7 % 9)}) for n in range(ROWS)]
    lines[3] = "not JSON"
    lines[9] = ""
    path.write_text("\n".join(lines), encoding="utf-8")


def whole_lines(path: Path) -> list[bytes]:
    data = path.read_bytes() if path.exists() else b""
    return data.splitlines(keepends=True) if data.endswith(b"\n") else data.splitlines(True)[:-1]


def test_killed_again_and_again(tmp_path):
    questions, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_questions(questions)
    command = [sys.executable, "-m", "infer.generate", "--batch-file", str(questions), *FLAGS]
    command += ["--compile-cache", str(tmp_path / "cache"), "--output"]
    where: dict = {"cwd": ROOT, "env": os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true"}}
    uninterrupted = subprocess.run([*command, str(tmp_path / "all")], **where, capture_output=True)
    assert uninterrupted.returncode == 3
    expected = (tmp_path / "all").read_bytes()

    command += [str(output)]
    journal = tmp_path / "out.jsonl.partial"
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        before = whole_lines(journal)
        process = subprocess.Popen(command, **where, stderr=subprocess.PIPE)
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
        found = f"continuing: {len(before) - 1} of {ROWS - 2} answered already".encode()
        assert (found in said) == bool(before)
        assert b"run the same command" in said and not output.exists()

    done = subprocess.run(command, **where, capture_output=True, text=True)
    assert done.returncode == 3 and f"{ROWS - 2} answered, 1 bad lines" in done.stderr
    assert f"{questions}:4: not JSON" in done.stderr
    assert output.read_bytes() == expected
    ids = [json.loads(line)["id"] for line in expected.splitlines()]
    assert ids == [n for n in range(ROWS) if n not in (3, 9)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("all", "cache", "in.jsonl", "out.jsonl")
    ]
