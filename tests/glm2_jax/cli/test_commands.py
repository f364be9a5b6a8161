"""The command `glm2`, and the lists of `python -m infer`, `train` and `convert`."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib

import pytest

from glm2_jax.cli import commands, foreign_flags
from tests.support.paths import ROOT

GLM2 = [sys.executable, "-P", "-c", "from glm2_jax.cli.commands import main; main()"]
OWN = 'raise SystemExit("the user\'s own file")'


def run(command, folder):
    """A command in a folder; this checkout is found as if it were installed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_command_is_a_module_and_every_tool_has_a_command():
    modules = {module for module, _ in commands.COMMANDS.values()}
    assert len(modules) == len(commands.COMMANDS)
    assert all(importlib.util.find_spec(module) for module in modules)
    tools = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for package in ("infer", "train", "convert")
        for path in (ROOT / package).rglob("*.py")
        if '\nif __name__ == "__main__":\n    interrupt.run(' in path.read_text("utf-8")
    }
    assert modules == tools
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"glm2": "glm2_jax.cli.commands:main"}


def test_a_command_runs_its_module_where_the_user_has_files_of_such_names(tmp_path):
    (tmp_path / "train.py").write_text(OWN)
    for package in ("convert", "infer", "glm2_jax"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(OWN)
    done = run([*GLM2, "lora", "--help"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: glm2 lora [flags] --data") and "--rank" in done.stdout
    assert "\n  glm2 lora --data" in done.stdout and "python -m" not in done.stdout
    done = run([*GLM2, "merge_lora"], tmp_path)  # underscores are hyphens; its errors, its code
    assert done.returncode == 2 and done.stderr.startswith("glm2 merge-lora: ")


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        ([], "  glm2 generate      answer"),
        (["--help"], "glm2 COMMAND --help lists"),
        (["--version"], "glm2-jax "),
        (["chatt", "--model", "x"], "unknown command 'chatt' (did you mean chat?)"),
        (["gen"], "unknown command 'gen' (did you mean generate?)"),
        (["--prompt", "x"], "unknown command '--prompt'\nglm2 --help lists them"),
    ],
)
def test_the_list_and_what_is_unknown(monkeypatch, capsys, argv, shown):
    monkeypatch.setattr(sys, "argv", ["glm2", *argv])
    if "unknown" in shown:
        with pytest.raises(SystemExit, match="2"):
            commands.main()
    else:
        commands.main()
    out, err = capsys.readouterr()
    assert shown in (err if "unknown" in shown else out) and not (out and err)


def test_a_package_lists_its_tools(monkeypatch, capsys):
    for package in ("infer", "train", "convert"):
        monkeypatch.setattr(sys, "argv", [package])
        commands.list_tools(package)
        lines = capsys.readouterr().out.splitlines()
        assert lines and all(line.startswith(f"  python -m {package}.") for line in lines)
    monkeypatch.setattr(sys, "argv", ["infer", "--version"])
    commands.list_tools("infer")
    assert capsys.readouterr().out.startswith("glm2-jax ")
    monkeypatch.setattr(sys, "argv", ["infer", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        commands.list_tools("infer")
    assert "unknown command 'nothing'" in capsys.readouterr().err


def test_every_help_shows_defaults_that_say_something_and_never_waits_for_jax():
    code = (
        "import contextlib, importlib, sys\nfrom glm2_jax.cli.commands import COMMANDS\n"
        "for module, _ in COMMANDS.values():\n"
        "    folder = importlib.util.find_spec(module).submodule_search_locations\n"
        "    tool = importlib.import_module(module + ('.__main__' if folder else ''))\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        tool.main(['--help'])\n"
        "    assert not {'jax', 'torch'} & set(sys.modules), module\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert text.count("show this help message") == len(commands.COMMANDS)
    for empty in ("None", "False", "[]", "", "()"):
        assert f"(default: {empty})" not in text
    flags = set(re.findall(r"--[a-z][\w-]*", text))
    assert {ours.split()[0] for ours in foreign_flags._THEIRS} <= flags
