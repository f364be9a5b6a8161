"""What the two READMEs show is what happens: every command in them is run, here or where named."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import save, write_official
from tests.support.paths import ROOT

READMES = ("README.md", "README_zh.md")

# Commands too heavy for this file: the file that runs them, and words in it that prove it.
ELSEWHERE = {
    "pip install -e .": (".ci/run", "pip install --quiet -e '.[test,lint]'"),
    "pip install -e '.[test]'": (".ci/run", "pip install --quiet -e '.[test,lint]'"),
    "pip install -e '.[cuda]'": ("pyproject.toml", "cuda = "),  # needs the hardware
    "pip install -e '.[tpu]'": ("pyproject.toml", "tpu = "),
    "pip install -e '.[hub]'": ("pyproject.toml", "hub = "),
    "pip install -e '.[plot]'": ("pyproject.toml", "plot = "),
    "pip install -e '.[export,gguf]'": ("pyproject.toml", "gguf = "),
    "python -m convert.merge_lora BASE ADAPTER MERGED": ("tests", "merge_lora"),
    "python -m convert.to_peft ADAPTER ADAPTER_GLM --layout glm --base BASE": ("tests", "to_peft"),
    "pip install -e '.[evaluate]'": ("pyproject.toml", "evaluate = "),
    "pip install -e '.[tpu-compile]'": ("pyproject.toml", "tpu-compile = "),
    "python -m train.lora --data examples/facts.jsonl --config examples/recipes/demo.yml"
    " --output adapter": (".ci/run", "python -m train.lora --data examples/facts.jsonl"),
    "python -m train.lora --data data.jsonl --check-data": ("tests", '"--check-data"'),
    "python -m train.lora --data data.jsonl --model FOLDER --output adapter --resume auto": (
        "tests",
        '"-m", "train.lora"',
    ),
    "python -m train.full --data data.jsonl --model FOLDER --output trained": (
        "tests",
        "full.main(",
    ),
    "python -m infer.launch --num-processes 2 -- python -m train.lora --data data.jsonl"
    " --output adapter --mesh data=2": ("tests", '"infer.launch"'),
    "python -m infer.generate --model THUDM/chatglm2-6b --source hf --prompt 你好": (
        "tests",  # against a server of our own
        "test_commands_and_the_engine_take_names",
    ),
    "python -m pytest": (".ci/run", "python -m pytest"),
    "bash .ci/run": (".ci/run", "set -euo pipefail"),
    "python -m train.demo": ("tests", "train.demo"),
}


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of one language in a README."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[str]:
    """Every shell command of a README, `a && b` taken apart, comments dropped, in order."""
    lines = "".join(blocks(name, "bash")).splitlines()
    parts = [part for line in lines for part in line.partition("#")[0].split("&&")]
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


HERE = [command for command in commands("README.md") if command not in ELSEWHERE]
MODULES = sorted(
    set(re.findall(r"python -m ((?:infer|convert|train)\.\w+)", str(commands("README.md"))))
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache folder, so that the commands share what they compile."""
    return tmp_path_factory.mktemp("cache")


def shell(command: str, folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command with this interpreter as `python`, away from the checkout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    environment |= {"XDG_CACHE_HOME": str(cache), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=os.environ | environment,
        input="你好\n",  # for the commands that ask for it
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_both_languages_show_the_same():
    assert commands("README.md") == commands("README_zh.md")
    for language in ("console", "json"):
        assert blocks("README.md", language) == blocks("README_zh.md", language)
    examples = [re.sub(r"  #.*", "", blocks(name, "python")[0]) for name in READMES]
    assert examples[0] == examples[1]  # but for the comments


@pytest.mark.parametrize("command", HERE)
def test_command(command, tmp_path, cache):
    questions = blocks("README.md", "json")[0]
    (tmp_path / "questions.jsonl").write_text(questions, encoding="utf-8")
    write_official(tmp_path / "FOLDER")
    if "inspect CONVERTED" in command:
        save(tmp_path / "CONVERTED")
    done = shell(command, tmp_path, cache)
    assert done.returncode == 0, done.stderr
    answers = tmp_path / "answers.jsonl"
    shown = answers.read_text(encoding="utf-8") if answers.exists() else done.stdout
    written = [tmp_path / "CONVERTED" / "manifest.json", tmp_path / "NATIVE" / "config.json"]
    assert shown.strip() or any(path.exists() for path in written), done.stderr


@pytest.mark.parametrize("command", ELSEWHERE)
def test_the_others_are_run_elsewhere(command):
    assert command in commands("README.md")
    name, words = ELSEWHERE[command]
    place = ROOT / name
    files = [place] if place.is_file() else [p for p in place.rglob("*.py") if p != Path(__file__)]
    assert any(words in file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("module", MODULES)
def test_help(module, tmp_path, cache):
    done = shell(f"python -m {module} --help", tmp_path, cache)
    assert done.returncode == 0, done.stderr
    assert f"python -m {module}" in done.stdout


def test_transcript(tmp_path):
    prompt, _, shown = blocks("README.md", "console")[0].partition("\n")
    done = shell(prompt.removeprefix("$ "), tmp_path, tmp_path / "cache")
    assert done.stdout.strip() and done.stdout.strip() in shown


def test_python_example(capsys):
    (example,) = blocks("README.md", "python")
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "glm2-jax" in printed and "stop" in printed


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target[1:] in headings if target.startswith("#") else (ROOT / target).exists()
