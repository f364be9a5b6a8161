"""An explanation as one HTML file, see `infer.page`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from glm2_jax.cli.files import replace_file, require_file_place
from infer.explain.facts import Values, Walk
from infer.page import fill_page


def write_page(path: Path, walk: Walk, values: Values | None) -> None:
    """Write the page; a file of that name is replaced by a complete page or not at all.

    Without values the page shows shapes and costs alone. InputError: it cannot be written.
    """
    replace_file(require_file_place(path), make_page(walk, values).encode("utf-8"))


def make_page(walk: Walk, values: Values | None) -> str:
    """Return the page's text."""
    data = {"walk": asdict(walk), "values": None if values is None else asdict(values)}
    return fill_page("infer.explain", ("page.js", "page_values.js"), data)
