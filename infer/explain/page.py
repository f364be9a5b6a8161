"""An explanation as one HTML file, which needs no network, no server and no other file.

The page is drawn in the browser from the data that it contains, by the script that it contains; its
security policy allows that script and that style and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from glm2_jax.cli.files import replace_file, require_file_place
from infer.explain.facts import Values, Walk

_IN_SCRIPT = {char: f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def write_page(path: Path, walk: Walk, values: Values | None) -> None:
    """Write the page; a file of that name is replaced by a complete page or not at all.

    Without values the page shows shapes and costs alone. InputError: it cannot be written.
    """
    replace_file(require_file_place(path), make_page(walk, values).encode("utf-8"))


def make_page(walk: Walk, values: Values | None) -> str:
    """Return the page's text."""
    style, script = _part("page.css"), _part("page.js") + _part("page_values.js")
    data = {"walk": asdict(walk), "values": None if values is None else asdict(values)}
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    filled = {
        "@STYLE_HASH@": _hash(style),
        "@SCRIPT_HASH@": _hash(script),
        "@STYLE@": style,
        "@SCRIPT@": script,
        # Nothing in it ends its script. Last: it may contain the other names.
        "@DATA@": text.translate(str.maketrans(_IN_SCRIPT)),
    }
    page = _part("page.html")
    for place, text in filled.items():
        page = page.replace(place, text, 1)
    return page


def _part(name: str) -> str:
    return files("infer.explain").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
    return f"'sha256-{digest}'"
