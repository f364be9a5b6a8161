"""The notebooks of docs/notebooks: their code runs, and both languages have the same."""

import re

import pytest

from tests.support.notebooks import ENGLISH, code_cells, execute, in_chinese, read

each_notebook = pytest.mark.parametrize("path", ENGLISH, ids=lambda path: path.stem)


def test_there_are_two():
    assert [path.stem for path in ENGLISH] == ["answer", "teach"]


@each_notebook
def test_both_languages_are_the_same_but_for_the_text(path):
    english, chinese = read(path), read(in_chinese(path))
    assert code_cells(english) == code_cells(chinese)  # with the stored outputs
    for one, other in zip(english.cells, chinese.cells, strict=True):
        assert (one.cell_type, one.id) == (other.cell_type, other.id)
        if one.cell_type == "markdown":
            texts = (one.source, other.source.replace(".zh.", "."))
            marks = [sorted(re.findall(r"^#+ |^\* |`[^`]+`", x, re.MULTILINE)) for x in texts]
            assert marks[0] == marks[1], one.id
    assert f"[中文]({in_chinese(path).name})" in english.cells[0].source
    assert f"[English]({path.name})" in chinese.cells[0].source


@each_notebook
def test_the_outputs_are_stored(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not re.search(r"/(?:tmp|home|root|work)/", str([cell.outputs for cell in cells]))
    assert path.stat().st_size < 300_000


@each_notebook
def test_the_code_runs(path, tmp_path, tmp_path_factory, monkeypatch):
    """Its assertions are what has to come out; both notebooks share what they compile."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "notebooks"))
    stored, ran = read(path), read(path)
    execute(ran, tmp_path)
    for before, after in zip(code_cells(stored), code_cells(ran), strict=True):
        kinds = [[output.output_type for output in cell.outputs] for cell in (before, after)]
        assert kinds[0] == kinds[1], after.source
