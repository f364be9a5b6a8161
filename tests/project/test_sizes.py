"""Files and functions stay small enough to read; the list of slow test files names files."""

import ast

import pytest

from tests.conftest import SLOW
from tests.support.paths import ROOT

FILE, FUNCTION = 400, 60  # lines
SOURCES = sorted(
    path
    for folder in "glm2_jax convert infer train examples benchmarks deploy tests".split()
    for path in (ROOT / folder).rglob("*.py")
)


def too_long(text: str) -> list[str]:
    """What exceeds a limit in the text of a module."""
    lines = len(text.splitlines())
    found = [f"{lines} lines"] if lines > FILE else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION:
                found.append(f"{node.name}: {length} lines")
    return found


def test_files_and_functions_are_short():
    found = {
        path.relative_to(ROOT).as_posix(): too_long(path.read_text("utf-8")) for path in SOURCES
    }
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(("more", "found"), [(57, []), (58, ["f: 61 lines"])])
def test_the_check_counts(more, found):
    assert too_long("def f():\n" + '    """Docs."""\n' * (more + 2)) == found
    assert too_long("x = 1\n" * (more + 343)) == ([] if not found else ["401 lines"])


def test_the_slow_files_exist():
    assert [name for name in SLOW if not (ROOT / "tests" / f"{name}.py").exists()] == []
