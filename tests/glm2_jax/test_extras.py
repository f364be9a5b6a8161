"""The commands that install what only some commands need."""

import re
import subprocess
import sys
import tomllib

import pytest

from glm2_jax.extras import PACKAGES, pip_install
from tests.project.test_layers import FLOORS
from tests.support.paths import ROOT


def test_the_packages_are_those_of_the_project_file():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    for extra, names in PACKAGES.items():
        assert names.split() == [re.split("[>=;]", text)[0] for text in extras[extra]], extra
    assert pip_install("plot") == "pip install matplotlib"
    assert pip_install("cuda") == "pip install 'jax[cuda12]'"  # as a shell needs it


def test_nothing_names_a_package_that_no_index_has():
    paths = [
        *(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")),
        *(ROOT / "docs").glob("*.md"), *ROOT.glob("README*.md"),
    ]  # fmt: skip
    assert len(paths) > 100
    assert [path for path in paths if "glm2-jax[" in path.read_text("utf-8")] == []


@pytest.mark.parametrize("command", ["infer.generate", "train.lora", "convert.inspect"])
def test_a_command_without_the_packages_says_what_to_do(command):
    argv = [sys.executable, "-S", "-m", command, "--help"]  # -S: as if nothing were installed
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].endswith("jax, flax, sentencepiece, yaml") and len(lines) == 3
