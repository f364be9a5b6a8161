"""The three steps of `--task rate`: write a sheet, let a model rate it, read the ratings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from glm2_jax.cli.bundled import MODELS, find_bundled
from glm2_jax.cli.files import real_path, replace_file, require_file_place
from glm2_jax.cli.messages import note
from glm2_jax.errors import InputError, UsageError
from glm2_jax.escape import join_lines, json_line
from glm2_jax.processes import join
from infer.evaluate.rate.answers import read_systems
from infer.evaluate.rate.ratings import MODEL, read_raters, write_ratings
from infer.evaluate.rate.report import report, result
from infer.evaluate.rate.sheet import key_path, make_sheet, read_sheet

if TYPE_CHECKING:
    from infer.evaluate.options import Settings

_COMMON = ("task", "sheet", "debug")
_STEPS = {  # the flags of each step; judge has those of a model, too
    "answers": ("scale", "limit", "seed", "overwrite"),
    "judge": ("overwrite",),
    "rates": ("drop_inattentive", "seed", "json"),
}
_NOT_OF_JUDGE = ("model", "scale", "limit", "seed", "drop_inattentive", "json")


def run(settings: Settings, given: Mapping[str, str]) -> int:
    """Do what the flags ask for; `given` as in `infer.evaluate.run.run`."""
    asked = [name for name in _STEPS if getattr(settings, name)]
    if settings.sheet is None or len(asked) != 1:
        raise UsageError(
            "--task rate needs --sheet FILE.html and one of --answers, --judge and --rates",
            "First --answers writes the sheet; then people, and --judge, rate it; --rates reads.",
        )
    (step,) = asked
    known = (step, *_COMMON, *_STEPS[step])
    idle = [name for name in given if name not in known]
    if step == "judge":
        idle = [name for name in idle if name in _NOT_OF_JUDGE]
    if idle:
        flags = ", ".join(given[name] for name in idle)
        raise UsageError(f"{flags}: no effect with --{step}", fix="Leave it out.")
    work = {"answers": write_sheet, "judge": judge_sheet, "rates": show_ratings}[step]
    work(settings, Path(settings.sheet))
    return 0


def write_sheet(settings: Settings, path: Path) -> None:
    """Write the page and its key."""
    assert settings.answers is not None
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--sheet must end in .html, got {path}")
    place, key = (_free(one, settings.overwrite) for one in (path, key_path(path)))
    systems = read_systems(settings.answers)
    sheet = make_sheet(systems, settings.scale, settings.seed, settings.limit)
    if not join.is_first():
        return
    replace_file(key, sheet.key())
    replace_file(place, sheet.page().encode())
    real = sum(item.kind == "item" for item in sheet.items)
    if sheet.identical:
        note(f"pairs left out, because both answers are the same: {sheet.identical}")
    note(f"{real} items and {len(sheet.items) - real} attention checks are on {path}")
    note(f"which model gave which answer is in {key_path(path)}: raters should not see it")


def judge_sheet(settings: Settings, path: Path) -> None:
    """Let a model rate, and write its ratings."""
    assert settings.judge is not None
    sheet = read_sheet(path)
    folder, name = find_bundled(settings.judge, MODELS), real_path(settings.judge).name
    if folder != settings.judge:
        note("the judge is the bundled demo model, which never learned to judge")
    out = path.with_name(f"{path.stem}.{name}.json")
    place = _free(out, settings.overwrite)
    from infer.evaluate.rate.judge import judge
    from infer.startup import open_engine

    choice = dataclasses.replace(settings.choice, path=folder)
    batch = settings.batch_size
    engine = open_engine(choice, settings.options, rows=batch, contents={"sheet": sheet.id})
    marks = judge(engine, sheet, batch)
    if join.is_first():
        replace_file(place, write_ratings(sheet, name, MODEL, marks))
        note(f"the ratings of {name} are in {out}")


def show_ratings(settings: Settings, path: Path) -> None:
    """Print what the ratings say."""
    assert settings.rates is not None
    sheet = read_sheet(path)
    raters = read_raters(sheet, settings.rates)
    found = result(sheet, raters, settings.drop_inattentive, settings.seed)
    text = json_line(found, allow_nan=False) if settings.json else join_lines(report(found))
    print(text, flush=True)


def _free(path: Path, overwrite: bool) -> Path:
    """Return the place of a file to write, links followed."""
    if real_path(path).is_file() and not overwrite:
        what = f"{path} exists already"
        raise InputError(what, "People may be rating it.", "Name another file, or add --overwrite.")
    return require_file_place(path)
