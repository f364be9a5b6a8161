"""Every command that README.md or a page of the site shows is run, here or in the file named here.

Commands in a block of "bash" are run, in the order of the pages, in one folder and one process; a
command that stands in several pages is run once. In a block of "shell" are commands for another
machine or a large model: of those that are ours, the flags are checked.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest

from docs._commands import main_of, parser_of
from infer.bench import harness
from tests.support.checkpoints import write_official
from tests.support.pages import blocks, commands, module_and_words, pages
from tests.support.paths import ROOT

# Of the server: both are run together by tests/project/test_deploy.py.
SERVING = (
    "python -m infer.serve",
    "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json'"
    """ -d '{"messages": [{"role": "user", "content": "你好"}]}'""",
)
INSTALLED = (".ci/run", "pip install --quiet -e '.[test,clients,lint,docs]'")

# Commands too heavy for this file: the file that runs them, and words in it that prove it.
ELSEWHERE = {
    "pip install -e .": INSTALLED,
    "pip install -e '.[test]'": INSTALLED,
    **{
        f"pip install -e '.[{extra}]'": ("pyproject.toml", f"{extra} = ")
        for extra in ("cuda", "tpu", "serve", "hub")
    },
    "python -m convert.merge_lora BASE ADAPTER MERGED": ("tests", "merge_lora"),
    "python -m train.lora --data examples/facts.jsonl --config demo"
    " --output adapter": (".ci/run", "python -m train.lora --data examples/facts.jsonl"),
    "python -m infer.evaluate --task cases --cases examples/cases/facts.yml --adapter adapter": (
        ".ci/run", "--cases examples/cases/facts.yml --adapter"
    ),
    "python -m convert.merge_lora infer/demo adapter MERGED": (".ci/run", "convert.merge_lora"),
    "python -m convert.quantize MERGED INT4 --method gptq --group 64 --calibration"
    " train/demo/pairs.jsonl --samples 16 --length 128": (".ci/run", "convert.quantize"),
    "python -m infer.evaluate --model INT4 --against MERGED --data examples/facts.jsonl": (
        ".ci/run", "--against"
    ),
    "python -m infer.evaluate --task cases --cases examples/cases/facts.yml --model INT4": (
        ".ci/run", "--cases examples/cases/facts.yml --model"
    ),
    "python -m train.lora --data data.jsonl --model FOLDER --output adapter --resume auto": (
        "tests", '"-m", "train.lora"',
    ),
    "python -m train.full --data data.jsonl --model FOLDER --output trained": (
        "tests", "full.main(",
    ),
    "python -m infer.launch --num-processes 2 -- python -m train.lora --data data.jsonl"
    " --output adapter --mesh data=2": ("tests", '"infer.launch"'),
    "python -m infer.generate --model THUDM/chatglm2-6b --source hf --prompt 你好": (
        "tests", "test_commands_and_the_engine_take_names",  # against a server of our own
    ),
    **{command: ("tests", "test_the_commands_of_the_readme") for command in SERVING},
    "python -m pytest": (".ci/run", "python -m pytest"),
    "python -m infer.lab examples/lab/layer_skip.py --set skip=2 --json": (
        "tests/infer/lab/test_lab.py", '"--set", "skip=1"'
    ),
    "python -m infer.lab examples/lab/*.py --plot lab.png": (
        "tests/infer/lab/test_lab_examples.py", "examples/lab"
    ),
    "python -m infer.evaluate --task cases --cases examples/cases/demo.yml": (
        "tests/infer/evaluate/test_cases.py", "test_the_demo_passes_its_cases"
    ),
    "python examples/sharding/compare.py": (
        "tests/glm2_jax/test_sharding_examples.py", 'example("compare.py"'
    ),
    "python examples/sharding/model.py --mesh data=2,tensor=4": (
        "tests/glm2_jax/test_sharding_examples.py", '"model.py"'
    ),
    "python examples/sharding/model.py --mesh data=2,tensor=2": (
        "tests/glm2_jax/test_sharding_examples.py", '"model.py", "--mesh", "data=2,tensor=2"'
    ),
}  # fmt: skip

# Pages whose Python examples are run, one after another with the same variables.
EXAMPLES = [name for name in ("README.md", "docs/use/python.md") if (ROOT / name).exists()]

BATCH = "docs/use/batch.md"  # its first rows are the questions of the commands

# Harmless programs that a page may use with its own files.
PLAIN = {"cat", "cp", "echo", "head", "ls", "mkdir", "printf", "tail", "wc"}
# What a command writes in place of an answer.
WRITTEN = re.compile(r"(?: --output| -o|convert\.\w+ \S+) (\S+)")

SHOWN: dict[str, str] = {}  # the commands in the order of the pages, each with its first page
for page in pages():
    for command in commands(page):
        SHOWN.setdefault(command, page)
HERE = [command for command in SHOWN if command not in ELSEWHERE]
ALONE = [command for command in HERE if "XLA_FLAGS" in command]  # needs a jax of its own
TOGETHER = [command for command in HERE if command not in ALONE]


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command with this interpreter as `python`, away from the checkout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
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
    folder = tmp_path_factory.mktemp("pages")
    rows = (ROOT / "examples/facts.jsonl").read_text(encoding="utf-8")
    (folder / "data.jsonl").write_text(rows, encoding="utf-8")
    questions = blocks(BATCH, "json")[0] if (ROOT / BATCH).exists() else ""
    (folder / "questions.jsonl").write_text(questions, encoding="utf-8")
    write_official(folder / "FOLDER")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def done(folder) -> dict[str, tuple[int, str, str]]:
    """What the commands and examples of one process returned and printed, by command or page."""
    process = shell(f"python -m {__name__}", folder)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def main() -> None:
    """Run the commands and the examples as `python -m` would, in one process: jax starts once."""
    # The limits of this machine are not what is looked at.
    harness.measure_ceilings = partial(harness.measure_ceilings, array_bytes=2**20, matrix=64)
    found = {command: _caught(partial(run, command)) for command in TOGETHER}
    for page in EXAMPLES:
        found[page] = _caught(partial(exec, "\n".join(blocks(page, "python")), {}))
    print(json.dumps(found))


def _caught(work) -> tuple[int, str, str]:
    """The exit code of `work`, and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 1
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = work()
        except SystemExit as ending:
            code = ending.code
        except Exception:
            traceback.print_exc()
    return code or 0, out.getvalue(), err.getvalue()


def run(command: str) -> int | None:
    """Run a command; ours reads what a plain program before it prints: `echo 你好 | ...`."""
    typed, _, ours = command.rpartition("| ")
    found = module_and_words(ours)
    others = typed or "echo 你好" if found else command
    first = others.split()[0]
    assert first in PLAIN, f"{SHOWN[command]}: no test runs {first}: name one in ELSEWHERE"
    process = subprocess.run(others, shell=True, capture_output=True)
    if not found:
        print(process.stdout.decode() or command)
        return process.returncode
    sys.stdin = io.TextIOWrapper(io.BytesIO(process.stdout), encoding="utf-8")
    module, words = found
    return main_of(module).main(words)


def test_a_command_that_no_test_runs_is_named(monkeypatch):
    for command in ("docker ps", "curl localhost | python -m infer.generate --prompt -"):
        monkeypatch.setitem(SHOWN, command, "docs/page.md")
        with pytest.raises(AssertionError, match="docs/page.md: no test runs (docker|curl)"):
            run(command)


@pytest.mark.parametrize("command", TOGETHER)
def test_command(command, done, folder):
    code, out, err = done[command]
    assert code == 0, f"{SHOWN[command]}: {err}"
    written = WRITTEN.search(command)
    assert out.strip() or (written and (folder / written[1]).exists()), err


@pytest.mark.parametrize("command", ALONE)
def test_command_with_a_setting(command, folder):
    process = shell(command, folder)
    assert process.returncode == 0 and process.stdout.strip(), process.stderr


def test_the_others_are_run_elsewhere():
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    for command, (name, words) in ELSEWHERE.items():
        assert command in SHOWN, f"no page shows this any more: {command}"
        files = tests if name == "tests" else [ROOT / name]
        assert any(words in file.read_text(encoding="utf-8") for file in files), command


def test_transcript(done):
    prompt, _, shown = blocks("README.md", "console")[0].partition("\n")
    _, out, _ = done[prompt.removeprefix("$ ")]
    assert out.strip() and out.strip() in shown


@pytest.mark.parametrize("page", EXAMPLES)
def test_python_examples(page, done):
    code, out, err = done[page]
    assert code == 0 and "glm2-jax" in out and "stop" in out, err


OTHERS = {command: name for name in pages() for command in commands(name, "shell")}
OURS = re.compile(r"(?:python -m (?:infer|train|convert)\.|\bglm2 ).*?(?= (?:\||>|&)|$)", re.DOTALL)


@pytest.mark.parametrize("command", [*filter(OURS.search, OTHERS)])
def test_flags_of_a_command_for_another_machine(command):
    for ours in OURS.findall(command):
        found = module_and_words(ours)
        assert found is not None, f"{OTHERS[command]}: there is no such command"
        module, words = found
        assert parser_of(module).parse_args(words)


if __name__ == "__main__":
    main()
