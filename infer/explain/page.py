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
from typing import Any

from glm2_jax.cli.files import replace_file, require_file_place
from infer.explain.facts import Values, Walk

_DIGITS = 4  # of a probability in an attention map: more than a color can show
_IN_SCRIPT = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}


def write_page(path: Path, walk: Walk, values: Values | None) -> None:
    """Write the page; a file of that name is replaced by a complete page or not at all.

    Args:
        values: None = the page shows shapes and costs alone.

    Raises:
        InputError: the file cannot be written.
    """
    replace_file(require_file_place(path), make_page(walk, values).encode("utf-8"))


def make_page(walk: Walk, values: Values | None) -> str:
    """Return the page's text."""
    style, script = _part("page.css"), _part("page.js") + _part("page_values.js")
    data = {"walk": asdict(walk), "values": None if values is None else _values(values)}
    filled = {
        "@STYLE_HASH@": _hash(style),
        "@SCRIPT_HASH@": _hash(script),
        "@STYLE@": style,
        "@SCRIPT@": script,
        "@DATA@": _json(data),  # last: it may contain the other names
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


def _values(values: Values) -> dict[str, Any]:
    """Return the values, of attention without what is masked: row t has t + 1 numbers."""
    heads = [
        {
            "layer": head.layer,
            "head": head.head,
            "weights": [
                [round(weight, _DIGITS) for weight in row[: t + 1]]
                for t, row in enumerate(head.weights)
            ],
        }
        for head in values.heads
    ]
    return asdict(values) | {"heads": heads}


def _json(data: Any) -> str:
    """Return JSON that does not end its script: in strings, HTML is written as \\u."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(str.maketrans(_IN_SCRIPT))
