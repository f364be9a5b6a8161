"""Runs the notebooks of docs/notebooks; `python -m tests.support.notebooks` stores their outputs.

A notebook exists in two languages with the same code, so it runs once and both get its outputs.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.support.paths import ROOT

FOLDER = ROOT / "docs" / "notebooks"
ENGLISH = sorted(path for path in FOLDER.glob("*.ipynb") if ".zh." not in path.name)


def in_chinese(path: Path) -> Path:
    """The same notebook in Chinese."""
    return path.with_suffix(".zh.ipynb")


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook: NotebookNode, folder: str | Path) -> None:
    """Run all cells with the folder as working directory; an error of a cell is raised."""
    kernel = {"metadata": {"path": str(folder)}}
    options = {"timeout": 300, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources=kernel, **options).execute()
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = output.text.replace(f"{ROOT}/", "")


def main(names: list[str]) -> None:
    """Run the notebooks of these names, by default all, and store the outputs in both languages."""
    for path in ENGLISH:
        if names and path.stem not in names:
            continue
        notebook, other = read(path), read(in_chinese(path))
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, folder)
        for ran, cell in zip(code_cells(notebook), code_cells(other), strict=True):
            cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
        nbformat.write(notebook, path)
        nbformat.write(other, in_chinese(path))


if __name__ == "__main__":
    main(sys.argv[1:])
