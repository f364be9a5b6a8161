"""HTML pages as one file, which needs no network, no server and no other file.

A page is drawn in the browser from the data that it contains, by the script that it contains; its
security policy allows that script and that style and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

_IN_SCRIPT = {char: f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def fill_page(package: str, scripts: Sequence[str], data: Any) -> str:
    """Return the text of a page: the page.html and page.css of a package, its scripts, and data,
    which become JSON."""

    def part(name: str) -> str:
        return files(package).joinpath(name).read_text(encoding="utf-8")

    style, script = part("page.css"), "".join(map(part, scripts))
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    filled = {
        "@STYLE_HASH@": _hash(style),
        "@SCRIPT_HASH@": _hash(script),
        "@STYLE@": style,
        "@SCRIPT@": script,
        # Nothing in it ends its script. Last: it may contain the other names.
        "@DATA@": text.translate(str.maketrans(_IN_SCRIPT)),
    }
    page = part("page.html")
    for place, text in filled.items():
        page = page.replace(place, text, 1)
    return page


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
    return f"'sha256-{digest}'"
