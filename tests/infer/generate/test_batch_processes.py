"""A batch file that two processes answer together: one of them writes, both know what is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

from infer.engine.engine import Engine
from infer.generate import __main__ as generate
from tests.support.paths import ROOT

PROMPTS = ["你好", "你是谁？", "Who are you?", "1+1=?", "再见"]
FLAGS = ["--dtype", "float32", "--layers", "list", "--batch-size", "2", "--max-new-tokens", "8"]


def test_two_processes_go_on_with_what_one_left(tmp_path, monkeypatch):
    questions, ours, theirs = (str(tmp_path / name) for name in ("in", "ours", "theirs"))
    Path(questions).write_text("".join(f"{json.dumps({'prompt': text})}\n" for text in PROMPTS))
    command = ["--batch-file", questions, *FLAGS]
    assert generate.main([*command, "--output", ours]) == 0
    complete, calls = Engine.complete, []

    def killed(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return complete(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "complete", killed)
    try:
        generate.main([*command, "--output", theirs])
    except KeyboardInterrupt:
        assert Path(f"{theirs}.partial").exists()
    launch = ["-m", "infer.launch", "--num-processes", "2", "--devices-per-process", "1", "--"]
    again = [*launch, sys.executable, "-m", "infer.generate", *command, "--mesh", "data=2"]
    done = subprocess.run(
        [sys.executable, *again, "--output", theirs], cwd=ROOT, capture_output=True, text=True,
        env=os.environ, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "continuing: 2 of 5 answered already" in done.stderr
    assert "5 answered, 0 bad lines" in done.stderr and done.stdout == ""
    assert Path(theirs).read_bytes() == Path(ours).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["in", "ours", "theirs"]
