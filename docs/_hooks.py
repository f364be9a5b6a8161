"""What mkdocs does to the pages of this folder, which are also read as plain files.

A page with a comment `<!-- commands -->`, `<!-- changelog -->` or `<!-- notebook: FILE -->` gets
that text in its place: the flags of every command from its own parser, CHANGELOG.md, or a notebook.
"""

import json
import re
from pathlib import Path
from posixpath import normpath

from _commands import all_commands
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LANGUAGE_LINE = re.compile(r"^\[(?:中文|English)\]\([\w.-]+\)\n", re.MULTILINE)
OUTSIDE = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)\s#]+)\)")  # a link that may leave docs/
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
COPIES = "files"  # where such files are put on the site


@event_priority(-200)  # after i18n, which takes every file for one of docs/
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, as text that a browser shows."""
    for page in DOCS.rglob("*.md"):
        for _, target in OUTSIDE.findall(page.read_text(encoding="utf-8")):
            path = _outside(page, target)
            copy = f"{COPIES}/{path}.txt"
            if path and (ROOT / path).is_file() and copy not in files.src_uris:
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
    return files


def _outside(page: Path, target: str) -> str | None:
    """The path in the repository that a link of a page leads to, if it is not in docs/."""
    path = normpath((page.parent.relative_to(ROOT) / target).as_posix())
    return None if path.startswith(("docs/", "..")) else path


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Fill in what is generated, and fit links to the site."""
    file = Path(page.file.abs_src_path or "")
    markdown = LANGUAGE_LINE.sub("", markdown, count=1)
    markdown = PICTURE.sub(r"[\g<0>](\1)", markdown)  # a click shows it in full size
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", all_commands())
    if "<!-- changelog -->" in markdown:
        markdown = markdown.replace("<!-- changelog -->", _changelog())
    markdown = re.sub(
        r"<!-- notebook: (\S+) -->", lambda found: _notebook(file.parent / found[1]), markdown
    )

    def link(found: re.Match[str]) -> str:
        path = _outside(file, found[2])
        if path is None:
            return found[0]
        if (ROOT / path).is_dir():  # there is nothing that a browser could show
            return found[1]
        up = "../" * len(file.parent.relative_to(DOCS).parts)
        return f"[{found[1]}]({up}{COPIES}/{path}.txt)"

    return OUTSIDE.sub(link, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Mark code that is one short word, such as a flag, which a phone must not break in two."""
    return re.sub(r"<code>([^<\s]{1,24})</code>", r'<code class="word">\1</code>', html)


def _changelog() -> str:
    """CHANGELOG.md without its title, with links as from docs/reference/."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n")[2]
    return text.replace("](docs/", "](../")


def _notebook(path: Path) -> str:
    """The cells of an executed notebook: text, code, and what it printed or drew.

    After the first one, which has the title, is a link to the file.
    """
    book, parts = json.loads(path.read_text(encoding="utf-8")), []
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(LANGUAGE_LINE.sub("", source, count=1))
        elif cell["cell_type"] == "code":
            parts.append(_fenced(source, "python"))
            parts += [shown for output in cell["outputs"] if (shown := _output(output))]
    parts.insert(1, f"[{path.name}]({path.name})")
    return "\n\n".join(parts)


def _output(output: dict) -> str:
    if output["output_type"] == "stream":
        return _fenced("".join(output["text"]), "text") if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="" src="data:image/png;base64,{picture}">'
    return _fenced("".join(data["text/plain"]), "text") if "text/plain" in data else ""


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
