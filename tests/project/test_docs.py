"""The pages of docs/ that are in two languages say the same, and their links lead somewhere."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from glm2_jax import PRESETS
from infer.explain.__main__ import main as explain
from infer.memory.plan import cache_bytes
from tests.project.test_architecture_docs import numbers
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
LINK = re.compile(r"\]\([^)]*\)")
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CHINESE = sorted(DOCS.rglob("*.zh.md"))
NAMED = re.compile(
    r"(?<![\w/.-])((?:benchmarks|convert|examples|glm2_jax|infer|tests|train)/[\w/.*-]*\w)"
)
"""A file or folder of the repository, in a sentence or a command."""


def anchors(path: Path) -> set[str]:
    """Where links into a page may lead, as GitHub names its headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def short(path: Path) -> str:
    return str(path.relative_to(DOCS))


def test_every_page_is_in_both_languages():
    english = {path for path in DOCS.rglob("*.md") if not path.name.endswith(".zh.md")}
    assert {path.with_name(path.name.replace(".zh", "")) for path in CHINESE} == english


@pytest.mark.parametrize("path", CHINESE, ids=short)
def test_both_languages_say_the_same(path):
    english = path.with_name(path.name.replace(".zh", "")).read_text(encoding="utf-8")
    chinese = path.read_text(encoding="utf-8")
    assert f"[中文]({path.name})" in english and f"({path.name.replace('.zh', '')})" in chinese
    assert BLOCK.findall(english) == BLOCK.findall(chinese)
    pages = [LINK.sub("]", BLOCK.sub("", page)).splitlines() for page in (english, chinese)]
    for start in ("#", "|", "* ", "![", ""):
        lines = [[numbers(line) for line in page if line.startswith(start)] for page in pages]
        assert lines[0] == lines[1], start


@pytest.mark.parametrize(
    "path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.relative_to(DOCS))
)
def test_links_lead_somewhere(path):
    page = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", page):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_figures_of_other_families(capsys):
    """Of the table in docs/scale/meshes.md."""
    page = (DOCS / "scale/meshes.md").read_text(encoding="utf-8")
    row = r"^\| (\S+) \| (\d+): \w+.*? \| (\S+ GB) and (\S+ MB).*? \| (\d+) \|$"
    rows = re.findall(row, page, re.MULTILINE)
    assert len(rows) == 4
    for name, heads, weights, cache, reduces in rows:
        assert PRESETS[name].num_kv_heads == int(heads)
        explain(["--config", name, "--mesh", "tensor=8", "--device", "v5e-8"])
        out = capsys.readouterr().out
        assert f"weights {weights}, cache {cache}," in out
        assert f"{int(reduces) + 1} collectives" in out  # and one all-gather of the logits


def test_the_figures_of_the_generations():
    """Parameters and cache in docs/learn/architecture.md."""
    page = (DOCS / "learn/architecture.md").read_text(encoding="utf-8")
    cells = dict(re.findall(r"^\| ([\w ,]+?) \| (.*) \|$", page, re.MULTILINE))
    english = replace(PRESETS["glm-10b-chinese"], vocab_size=50304)
    chat = [PRESETS[name] for name in ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")]
    sandwich = PRESETS["glm-4-9b-0414"]
    counts = [f"{config.num_params:,}" for config in (english, *chat)]
    assert cells["parameters"] == f"{' | '.join(counts)} ({sandwich.num_params:,})"
    cache = [f"{cache_bytes(config, 2, 1, 1) // 1024} KiB" for config in (english, *chat)]
    assert cells["cache a token, 16 bits"] == " | ".join(cache)
    layers = [f"{config.num_layers} x {config.hidden_size}" for config in (english, *chat)]
    assert cells["layers x width"] == " | ".join(layers)


def test_files_that_pages_and_notebooks_name_exist():
    top = [ROOT / name for name in ("README.md", "README_zh.md", "CONTRIBUTING.md")]
    for path in [*top, *DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]:
        for name in NAMED.findall(path.read_text(encoding="utf-8")):
            assert any(ROOT.glob(name)), (path, name)
