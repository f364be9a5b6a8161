"""A batch file that two processes answer together: one of them writes, both know what is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

from glm2_jax.processes import join
from infer.engine.engine import Engine
from infer.evaluate.generation import check_output, predictions_file
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


def test_predictions_are_for_the_first_of_several_processes(tmp_path, monkeypatch):
    from infer.evaluate.__main__ import parser

    path = tmp_path / "answers.jsonl"
    path.write_text("an earlier one")
    args = parser().parse_args(["--task", "generation", "--predictions", str(path)])
    monkeypatch.setattr(join, "is_first", lambda: False)
    check_output(args)
    with predictions_file(args) as write:
        write(0, {"predict": "x"})
    assert path.read_text() == "an earlier one" and os.listdir(tmp_path) == [path.name]
