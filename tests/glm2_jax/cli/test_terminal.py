"""What comes from outside does nothing to a terminal: names, values, errors, reports."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

from convert import inspect
from glm2_jax.cli import main as cli
from glm2_jax.cli import messages
from glm2_jax.errors import CheckpointError, InputError
from glm2_jax.escape import escape_controls, join_lines, json_line
from infer.chat import __main__ as chat
from infer.engine.load import demo_folder
from infer.evaluate import __main__ as evaluate
from infer.explain import __main__ as explain
from infer.generate import __main__ as generate
from tests.support.commands import exit_code
from tests.support.paths import ROOT
from train import lora

EVIL = "名\x1b]0;title\x07\x9b2J\x85\u202e\u2028\r\nerror: fake"
ESCAPED = r"名\x1b]0;title\x07\x9b2J\x85\u202e\u2028\r\nerror: fake"


def harmless(text):
    return escape_controls(text, keep="\n") == text and "\nerror: fake" not in text


def test_letters_and_emoji_stay_and_all_else_is_escaped():
    plain = "汉字 👩‍👩‍👧 é עברית العربية \\ 'x'"
    assert escape_controls(plain) == plain
    assert escape_controls(EVIL) == ESCAPED == escape_controls(ESCAPED)
    assert escape_controls("a\tb\n\udcff\x7f", keep="\n") == "a\\tb\n\\udcff\\x7f"
    assert join_lines(["a", "b\nc"]) == "a\nb\\nc"
    line = json_line({"text": EVIL, "half": "\udcff"})
    assert harmless(line) and "名" in line and "\n" not in line
    assert json.loads(line) == {"text": EVIL, "half": "\udcff"}
    error = CheckpointError(f"what {EVIL}", ["one", f"two {EVIL}"], f"fix {EVIL}")
    assert str(error).split("\n") == [f"what {ESCAPED}", "one", f"two {ESCAPED}", f"fix {ESCAPED}"]


def test_notes_and_progress(capsys, monkeypatch):
    messages.note(f"read {EVIL}")
    with messages.Progress(EVIL, 1, interval=0) as bar:
        bar(1, EVIL)
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"read {ESCAPED}" and second.count(ESCAPED) == 2
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with messages.Progress("加载中") as bar:
        bar.last -= 1
        bar.update(1, 2)
        messages.note("a note")  # not on the line of the progress
        messages.note("another")
    shown, *notes = terminal.getvalue().split("\r\x1b[K")[1:]
    assert shown.startswith("加载中: 1 of 2, ") and notes == ["a note\nanother\n", ""]


def test_an_error_with_its_traceback(capsys):
    for error in (InputError(EVIL), OSError(5, EVIL, EVIL), MemoryError(EVIL), RuntimeError(EVIL)):
        cli.report(error, debug=True)
        said = capsys.readouterr().err
        assert escape_controls(said, keep="\n") == said and "title" in said


def test_a_name_that_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for main, *argv in (
        (generate.main, "--model", EVIL, "--prompt", "x"),
        (generate.main, "--batch-file", EVIL, "--output", f"{EVIL}/{EVIL}"),
        (generate.main, "--template", EVIL),
        (generate.main, f"--{EVIL}"),
        (generate.main, "--mesh", EVIL, "--prompt", "x"),
        (chat.main, "--model", f"owner/{EVIL}", "--source", "hf"),
        (evaluate.main, "--data", EVIL),
        (explain.main, "--html", f"{EVIL}/{EVIL}"),
        (inspect.main, EVIL),
        (lora.main, "--model", str(demo_folder()), "--data", EVIL, "--output", "o"),
    ):
        assert exit_code(main, *argv) in (2, 3, 4)
        out, err = capsys.readouterr()
        assert out == "" and ESCAPED in err and harmless(err), err


def test_names_in_reports(tmp_path, monkeypatch, capsys):
    """Of files and folders that can be read, where each line of a report has its name."""
    monkeypatch.chdir(tmp_path)
    model, data = tmp_path / EVIL, tmp_path / f"{EVIL}.jsonl"
    shutil.copytree(demo_folder(), model)
    row = {"instruction": "hello", "output": "hi", EVIL: 1}
    data.write_text("".join(f"{json.dumps(line)}\n" for line in (row, row, [], {"output": 1})))
    check = ["--model", model, "--data", data, "--output", "o", "--max-length", 64, "--check-data"]
    assert exit_code(inspect.main, model) == 0
    assert exit_code(explain.main, "--model", model, "--length", 3) == 0
    assert exit_code(lora.main, *check, "--print-sample", 1) == 3
    out, err = capsys.readouterr()
    assert harmless(out) and harmless(err) and out.count(ESCAPED) > 6
    batch = f"{EVIL}.batch"
    Path(batch).write_text(json.dumps({"prompt": "x", EVIL: 1}) + "\n[]\n", encoding="utf-8")
    assert exit_code(generate.main, "--batch-file", batch) == 3
    err = capsys.readouterr().err
    assert err.count(f"{ESCAPED}.batch:") == 2 and harmless(err)


def test_a_path_on_standard_output_is_escaped_for_a_terminal_alone(monkeypatch, capsys):
    cli.print_path(EVIL)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.print_path(EVIL)
    assert capsys.readouterr().out == f"{EVIL}\n{ESCAPED}\n"


def test_lines_of_native_code_in_a_process_of_several(tmp_path):
    """The launcher forwards what C++ writes into standard error."""
    code = (
        "import os, sys; from glm2_jax.processes import supervise; supervise.connect();"
        r"os.write(2, b'\x1b]0;title\x07 said\n')"
    )
    done = subprocess.run(
        [sys.executable, "-m", "infer.launch", "--num-processes", "1", "--", sys.executable,
         "-c", code], cwd=ROOT, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == b"\\x1b]0;title\\x07 said\n"


def test_one_of_several_processes_says_which_it_is(monkeypatch, capsys):
    for name in ("_prefix", "_silent"):
        monkeypatch.setattr(messages, name, getattr(messages, name))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    messages.speak_as("job 1")
    messages.note("begun")
    with messages.Progress("rows", 2, interval=0) as bar:
        bar(2)
    messages.complain("error: what", "why")
    err = capsys.readouterr().err
    assert all(line.startswith("job 1: ") for line in err.splitlines()) and err.count("\n") == 4
    messages.only_errors("process 1")
    messages.note("unheard")
    messages.complain("why")
    assert capsys.readouterr().err == "process 1: why\n"
