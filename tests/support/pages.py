"""What README.md and the English pages of docs/ show: their blocks, and the commands in them."""

import re
import shlex

from glm2_jax.cli.commands import COMMANDS
from tests.support.paths import ROOT

READMES = ("README.md", "README_zh.md")


def pages() -> list[str]:
    """README.md and the English pages of the site, by their paths in the repository."""
    found = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    return ["README.md", *(name for name in found if not name.endswith(".zh.md"))]


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of one language in a page."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands(name: str, language: str = "bash") -> list[str]:
    """The shell commands of a page: continued lines joined, comments dropped, `a && b` apart."""
    found, begun = [], ""
    for line in "".join(blocks(name, language)).splitlines():
        begun += re.sub(r"(?<!\S)#.*", "", line).strip()
        if begun.endswith("\\"):
            begun = begun[:-1]
        elif begun.count("'") % 2 or begun.count('"') % 2:  # a string of several lines
            begun += "\n"
        else:
            found += [part.strip() for part in begun.split("&&")]
            begun = ""
    assert not begun, f"{name}: a command does not end: {begun}"
    return list(dict.fromkeys(filter(None, found)))


def module_and_words(command: str) -> tuple[str, list[str]] | None:
    """The module of our command, `python -m infer.chat` or `glm2 chat`, and its arguments."""
    words = shlex.split(command)
    if words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("infer", "train", "convert"):
        return words[2], words[3:]
    if words[:1] == ["glm2"] and words[1:2] and words[1] in COMMANDS:
        return COMMANDS[words[1]][0], words[2:]
    return None
