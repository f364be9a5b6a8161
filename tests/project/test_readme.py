"""What the two READMEs show is what happens: every command in them is run, here or where named."""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest

from infer.bench import harness
from tests.support.checkpoints import write_official
from tests.support.paths import ROOT

READMES = ("README.md", "README_zh.md")

# Of the server: both are run together by tests/project/test_deploy.py.
SERVING = (
    "python -m infer.serve",
    "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json'"
    """ -d '{"messages": [{"role": "user", "content": "你好"}]}'""",
)

# Commands too heavy for this file: the file that runs them, and words in it that prove it.
ELSEWHERE = {
    "pip install -e .": (".ci/run", "pip install --quiet -e '.[test,clients,lint]'"),
    "pip install -e '.[test]'": (".ci/run", "pip install --quiet -e '.[test,clients,lint]'"),
    **{
        f"pip install -e '.[{extra}]'": ("pyproject.toml", f"{extra.split(',')[-1]} = ")
        for extra in ("cuda", "tpu", "serve", "hub")
    },
    "python -m convert.merge_lora BASE ADAPTER MERGED": ("tests", "merge_lora"),
    "python -m train.lora --data examples/facts.jsonl --config examples/recipes/demo.yml"
    " --output adapter": (".ci/run", "python -m train.lora --data examples/facts.jsonl"),
    "python -m train.lora --data data.jsonl --check-data": ("tests", '"--check-data"'),
    "python -m train.lora --data data.jsonl --model FOLDER --output adapter --resume auto": (
        "tests", '"-m", "train.lora"',
    ),
    "python -m infer.generate --model THUDM/chatglm2-6b --source hf --prompt 你好": (
        "tests", "test_commands_and_the_engine_take_names",  # against a server of our own
    ),
    **{command: ("tests", "test_the_commands_of_the_readme") for command in SERVING},
    "python -m pytest": (".ci/run", "python -m pytest"),
}  # fmt: skip


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
ALONE = [command for command in HERE if "XLA_FLAGS" in command]  # needs a jax of its own
TOGETHER = [command for command in HERE if command not in ALONE]


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with this interpreter as `python`, away from the checkout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment |= {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    environment |= {"XDG_CACHE_HOME": str(folder), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all commands run: they share what they compile, and find what those before wrote."""
    folder = tmp_path_factory.mktemp("readme")
    write_official(folder / "FOLDER")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def done(folder) -> dict[str, tuple[int, str, str]]:
    """What the commands of one process returned and printed, by command."""
    process = shell(f"python -m {__name__}", folder)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def main() -> None:
    """Run the commands and the example as `python -m` would, in one process: jax starts once."""
    # The limits of this machine are not what is looked at.
    harness.measure_ceilings = partial(harness.measure_ceilings, array_bytes=2**20, matrix=64)
    found, (example,) = {}, blocks("README.md", "python")
    for command in (*TOGETHER, example):
        out, err, code = io.StringIO(), io.StringIO(), 1
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run(command) if command in TOGETHER else exec(example, {})
            except Exception:
                traceback.print_exc()
        found[command] = code or 0, out.getvalue(), err.getvalue()
    print(json.dumps(found))


def run(command: str) -> int | None:
    typed, _, command = command.rpartition("| ")
    text = subprocess.run(typed or "echo 你好", shell=True, capture_output=True).stdout
    sys.stdin = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8")
    module, *argv = shlex.split(command)[2:]
    spec = importlib.util.find_spec(module)
    assert spec is not None
    main = f"{module}.__main__" if spec.submodule_search_locations else module
    return importlib.import_module(main).main(argv)


def test_both_languages_show_the_same():
    assert commands("README.md") == commands("README_zh.md")
    for language in ("console", "jsonl"):
        assert blocks("README.md", language) == blocks("README_zh.md", language)
    examples = [re.sub(r"  #.*", "", blocks(name, "python")[0]) for name in READMES]
    assert examples[0] == examples[1]  # but for the comments


@pytest.mark.parametrize("command", TOGETHER)
def test_command(command, done, folder):
    code, out, err = done[command]
    assert code == 0, err
    written = re.search(r"(?:CONVERTED|NATIVE|RANDOM|model\.gguf|answers\.jsonl)(?= |$)", command)
    assert (folder / written[0]).exists() if written else out.strip(), err


@pytest.mark.parametrize("command", ALONE)
def test_command_with_a_setting(command, folder):
    process = shell(command, folder)
    assert process.returncode == 0 and process.stdout.strip(), process.stderr


def test_the_others_are_run_elsewhere():
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    for command, (name, words) in ELSEWHERE.items():
        assert command in commands("README.md")
        files = tests if name == "tests" else [ROOT / name]
        assert any(words in file.read_text(encoding="utf-8") for file in files), command


def test_transcript(done):
    prompt, _, shown = blocks("README.md", "console")[0].partition("\n")
    _, out, _ = done[prompt.removeprefix("$ ")]
    assert out.strip() and out.strip() in shown


def test_python_example(done):
    (example,) = blocks("README.md", "python")
    code, out, err = done[example]
    assert code == 0 and "glm2-jax" in out and "stop" in out, err


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target[1:] in headings if target.startswith("#") else (ROOT / target).exists()


if __name__ == "__main__":
    main()
