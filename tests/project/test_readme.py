"""The two READMEs say the same, and their links lead somewhere."""

import re

import pytest

from tests.support.pages import READMES, blocks, commands
from tests.support.paths import ROOT


def test_both_languages_show_the_same():
    assert commands("README.md") == commands("README_zh.md")
    for language in ("console", "jsonl", "shell"):
        assert blocks("README.md", language) == blocks("README_zh.md", language)
    examples = [re.sub(r"  #.*", "", blocks(name, "python")[0]) for name in READMES]
    assert examples[0] == examples[1]  # but for the comments


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target[1:] in headings if target.startswith("#") else (ROOT / target).exists()
