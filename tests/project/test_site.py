"""What the pages of docs/start, docs/learn and docs/use show is what happens."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glm2_jax.cli.main import run_main
from infer.generate.__main__ import main as generate
from tests.support.checkpoints import write_official, write_quantized
from tests.support.pages import blocks
from tests.support.paths import ROOT

MODELS = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b-128k", "glm-4-9b-chat", "glm-4-32b-0414")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def run(argv: list[str]) -> tuple[int, str, str]:
    """Run `infer.generate` as the command does: (exit code, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as left:
            run_main(generate, argv)
    return int(left.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folders that the questions of docs/start/faq.md are about."""
    folder = tmp_path_factory.mktemp("faq")
    write_official(folder / "FOLDER")
    write_quantized(folder / "INT4", 4)
    for name in ("LFS", "MISSING", "DAMAGED", "OTHER", "models/FOLDER"):
        shutil.copytree(folder / "FOLDER", folder / name)
    first, second = (f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:cdf1bf57\nsize 1827780615\n"
    (folder / "LFS" / first).write_text(pointer)
    (folder / "MISSING" / second).unlink()
    (folder / "DAMAGED" / first).write_bytes((folder / "FOLDER" / first).read_bytes()[:30000])
    shutil.copy(ROOT / "infer/demo/tokenizer.model", folder / "OTHER")
    (folder / "LLAMA").mkdir()
    (folder / "LLAMA" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "gbk.txt").write_bytes("你好".encode("gbk"))
    return folder


FAILURES = blocks("docs/start/faq.md", "console")


@pytest.mark.parametrize("shown", FAILURES, ids=lambda shown: shown.partition("\n")[0][-40:])
def test_messages_of_the_questions(shown, folder, monkeypatch):
    monkeypatch.chdir(folder)
    command, _, message = shown.partition("\n")
    words = shlex.split(command.removeprefix("$ "))
    assert words[:3] == ["python", "-m", "infer.generate"]
    code, out, err = run(words[3:])
    assert code and not out
    assert err.replace(f"{folder}/", "").replace(str(folder), ".") == message


def test_which_form_fits_which_card():
    """The table of docs/use/models.md: the longest contexts in 16 bits, int8 and int4."""
    rows = re.findall(
        r"^\| [^|]*\(`([\w-]+)`\) \| (.*) \|$", page("docs/use/models.md"), re.MULTILINE
    )
    assert len(rows) >= 6
    for device, cells in rows:
        for model, cell in zip(MODELS, cells.split(" | "), strict=True):
            argv = ["--dry-run", "--json", "--config", model, "--device", device]
            plans = json.loads(run(argv)[1])["longest_context"]
            one = [plan["context"] for plan in plans if plan["batch"] == 1][1:]
            assert cell == " / ".join(f"{context:,}" if context else "–" for context in one)


SESSIONS = blocks("docs/learn/debugging.md", "console")
SCRIPTS = blocks("docs/learn/debugging.md", "python")


@pytest.mark.parametrize(
    ("shown", "script"), list(zip(SESSIONS, SCRIPTS, strict=True)), ids=["values", "shapes"]
)
def test_debugging_session(shown, script, tmp_path):
    command, _, shown = shown.partition("\n")
    setting, _, name = command.removeprefix("$ ").rpartition("python -m pdb ")
    (tmp_path / name).write_text(script, encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    environment |= dict(word.split("=") for word in setting.split())
    typed = re.findall(r"^\(Pdb\) (.*\n)", shown, re.MULTILINE)
    process = subprocess.run(
        [sys.executable, "-m", "pdb", name],
        cwd=tmp_path,
        env=os.environ | environment,
        input="".join([*typed, "q\n"]),
        capture_output=True,
        encoding="utf-8",
    )
    printed = process.stdout.replace(f"{ROOT}/", "").replace(f"{tmp_path}/", "")
    came = printed.partition("The program finished")[0]
    shown = re.sub(r"^\(Pdb\) .*\n", "(Pdb) ", shown, flags=re.MULTILINE)  # it is not echoed
    assert _lines(came) == _lines(shown), process.stderr


def _lines(text: str) -> str:
    """The text without the numbers of our lines, which move."""
    return re.sub(r"(glm2_jax/\w+\.py)(\(\d+\)|:\d+)", r"\1", text)


def test_places_to_change_exist():
    """The table of docs/learn/debugging.md."""
    rows = re.findall(
        r"^\| [^|]+ \| (`[^|]*\.py`) \| (`[^|]*`) \|$", page("docs/learn/debugging.md"), re.M
    )
    assert len(rows) > 12
    for files, names in rows:
        code = "".join(
            (ROOT / file).read_text(encoding="utf-8") for file in re.findall(r"`(.+?)`", files)
        )
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^ *(?:def |class )?{name}\b", code, re.MULTILINE), name
