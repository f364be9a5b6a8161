"""`python -m infer.lab` where an idea fails or prints: what was measured is shown all the same."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from glm2_jax.errors import CheckpointError, InputError
from glm2_jax.ideas import Idea, Reads
from infer.lab import run
from infer.lab.__main__ import main
from infer.lab.files import IdeaFile, blamed, read_ideas
from infer.lab.report import Report, Result, show
from tests.support.commands import exit_code

IDEA = """from glm2_jax.ideas import Idea
print("read")

def idea():
    print("made")
    return Idea()
"""
READS = Reads(4, 1, 9, 9, 9)


class FakeLab:
    """A lab that measures nothing: ideas named "bad" fail early, those named "late" in a step."""

    settings: Any = SimpleNamespace(repeat=2)

    def report(self) -> Report:
        return Report({"model": "toy", "device": "none", "load average": ""}, 512)

    def without_idea(self) -> Any:
        return Result("full model", 2.0, 0.0, 1.0, {}, READS, 4e6, None, 1e5, 10), lambda: 0.5

    def with_idea(self, file: IdeaFile) -> Any:
        file.idea(None)  # type: ignore[arg-type]
        if file.name == "bad":
            raise InputError(f"{file.path}:1: fails")

        def step() -> float:
            print("step")
            if file.name == "late":
                raise InputError(f"{file.path}:2: fails late")
            return 0.25

        nan = float("nan")
        return Result(file.name, 3.0, 0.5, 1.0, {"x": nan}, READS, 4e6, None, 1e5, 10), step


def lab_of(monkeypatch, folder, *names: str) -> list[str]:
    monkeypatch.setattr(run, "open_lab", lambda settings: FakeLab())
    for name in names:
        (folder / f"{name}.py").write_text(IDEA, encoding="utf-8")
    return [str(folder / f"{name}.py") for name in names]


@pytest.mark.parametrize(
    ("names", "shown", "error"),
    [
        (("one", "bad"), ["full model", "one"], "bad.py:1: fails"),
        (("one", "late", "two"), ["full model", "one", "two"], "late.py:2: fails late"),
        (("one", "bad", "two"), ["full model", "one"], "bad.py:1: fails"),
        (("bad", "two"), None, "bad.py:1: fails"),
    ],
)
def test_what_was_measured_before_an_idea_failed_is_shown(
    names, shown, error, monkeypatch, tmp_path, capsys
):
    paths = lab_of(monkeypatch, tmp_path, *names)
    assert exit_code(main, *paths, "--json") == 3
    out, err = capsys.readouterr()
    assert error in err and "Traceback" not in err
    if shown is None:
        assert out == ""
    else:
        assert [one["idea"] for one in json.loads(out)["ideas"]] == shown


def test_what_an_idea_prints_leaves_the_json_alone(monkeypatch, tmp_path, capsys):
    assert main([*lab_of(monkeypatch, tmp_path, "one"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["ideas"][1]["told"] == {"x": None} and len(out.splitlines()) == 1
    assert err.split() == ["read", "made", "step", "step"]


@pytest.mark.parametrize("figure", ["raises", float("inf")])
def test_nan_is_the_fault_of_the_idea(figure, monkeypatch, tmp_path):
    def measure(self, name, idea):
        assert idea == Idea()
        if figure == "raises":
            raise CheckpointError("the model produced NaN or Inf", "The weights are damaged.")
        return Result(name, 3.0, figure, 1.0, {}, READS, 4e6, None, 1e5, 10), None

    [path] = lab_of(monkeypatch, tmp_path, "one")
    monkeypatch.setattr(run.Lab, "_measure", measure)
    lab = object.__new__(run.Lab)
    lab.sample = None  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"^idea .*one.py produced NaN or Inf") as error:
        lab.with_idea(read_ideas([path], [])[0])
    assert "damaged" not in str(error.value)


def test_an_exit_without_a_line_is_an_error_of_the_file():
    with pytest.raises(InputError, match=r"^idea.py: SystemExit"), blamed("idea.py"):
        raise SystemExit(0)


def test_an_error_outside_of_the_file_is_the_ideas_all_the_same():
    """Not "please report it": the model without the idea was measured before."""
    with pytest.raises(InputError, match=r"^idea.py: TypeError: bad carry\nIt was raised out") as e:
        with blamed("idea.py"):
            raise TypeError("bad carry")
    assert "--debug shows the traceback" in e.value.fix
    for ours in (CheckpointError("the weights"), OSError(28, "No space left on device")):
        with pytest.raises(type(ours)) as kept, blamed("idea.py"):
            raise ours
        assert kept.value is ours


def test_the_table_fits_a_narrow_terminal(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(lab_of(monkeypatch, tmp_path, "one", "two")) == 0
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 40
    assert [line.split()[0] for line in out if line.startswith("full model")] == ["full"] * 3
    monkeypatch.setenv("COLUMNS", "160")
    assert main(lab_of(monkeypatch, tmp_path, "one", "two")) == 0
    [header] = (line for line in capsys.readouterr().out.splitlines() if "perplexity  " in line)
    assert header.split()[0] == "idea" and header.endswith("cache")


def test_an_option_without_a_default_value(monkeypatch, tmp_path, capsys):
    paths = lab_of(monkeypatch, tmp_path, "one")
    (tmp_path / "one.py").write_text(IDEA.replace("idea()", "idea(*, layers=None, name=None)"))
    for text, value in (("3", 3), ("0.5", 0.5), ("all", "all")):
        assert read_ideas(paths, [("layers", text)])[0].options == {"layers": value, "name": None}
    result = Result("one", 2.0, 0.0, 1.0, {}, READS, 4e6, None, 1e5, 10, seconds=[1.0])
    result.options = {"layers": 3, "name": None}
    capsys.readouterr()
    show(Report({}, 512, [result]), as_json=False)
    assert "one: layers 3\n" in capsys.readouterr().out
