"""The layers train > infer > convert > glm2_jax: imports only point down, and never at torch."""

import ast
import subprocess
import sys
import tomllib

import pytest

from tests.support.paths import ROOT

LAYERS = ("glm2_jax", "convert", "infer", "train")  # lowest first
FORBIDDEN = {"torch", "transformers", "tests"}
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported(source: str) -> set[str]:
    """Top-level names of everything that `source` imports, at module level or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def violations(layer: str, source: str) -> set[str]:
    """What a file of `layer` imports and must not."""
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    return imported(source) & (above | FORBIDDEN)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    layer = path.relative_to(ROOT).parts[0]
    assert violations(layer, path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("layer", "source", "found"),
    [
        ("glm2_jax", "import convert.inspect", {"convert"}),
        ("glm2_jax", "def f():\n    from infer import load", {"infer"}),
        ("convert", "import numpy, train.demo as d", {"train"}),
        ("infer", "from torch.utils import data", {"torch"}),
        ("infer", "from convert import load_checkpoint\nfrom .api import load", set()),
        ("train", "import glm2_jax, convert, infer, train.demo", set()),
    ],
)
def test_the_check_sees_what_it_should(layer, source, found):
    assert violations(layer, source) == found


def test_importing_the_packages_loads_no_torch():
    modules = "glm2_jax, convert, infer, train"
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_package_is_listed_for_installation():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in SOURCES}
    assert folders == set(config["tool"]["setuptools"]["packages"])
    assert all((ROOT / name.replace(".", "/") / "__init__.py").exists() for name in folders)
