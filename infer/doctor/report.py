"""What the doctor found, for a terminal and as JSON."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from glm2_jax.cli.main import EXIT_DEVICE
from glm2_jax.cli.messages import human_size
from glm2_jax.cli.tables import fold
from glm2_jax.escape import join_lines
from glm2_jax.runtime.machine import Machine
from infer.doctor.checkup import Report
from infer.doctor.forms import Model, Place
from infer.memory.precision import flags

WIDEST = 100
_MARK = 9  # columns of the mark, so that texts are aligned


def render(model: Model, report: Report, columns: int) -> str:
    """Write the report for people. Commands are never broken, so that they can be copied."""
    lines = []
    for title, findings in report.sections.items():
        lines.append(title)
        for finding in findings:
            text = f"  {finding.mark:<{_MARK}}{finding.text}"
            lines += fold(text, columns, " " * _MARK)
            if finding.fix:
                lines.append(f"  {'':<{_MARK}}do this: {finding.fix}")
        lines.append("")
    text = f"What fits: {model.name}, with room for {model.context:,} tokens"
    lines += fold(text, columns, "")
    for place in report.places:
        lines += _table(place, columns)
    lines += ["", *_conclusion(model, report, columns)]
    home = os.path.expanduser("~")  # a report that is pasted elsewhere does not name the user
    return join_lines(line.replace(home, "~") if len(home) > 1 else line for line in lines)


def _table(place: Place, columns: int) -> list[str]:
    budget = place.budget
    memory = "memory unknown" if budget.memory is None else f"{human_size(budget.memory)} to use"
    lines = fold(f"  {budget.name}, {memory}:", columns)
    for form in place.forms:
        answer = {True: "fits", False: "too large", None: "try it"}[budget.fits(form)]
        lines.append(f"    {form.precision.name:<9} {human_size(form.total):>8}  {answer}")
    return lines


def _conclusion(model: Model, report: Report, columns: int) -> list[str]:
    if report.exit_code == EXIT_DEVICE:
        text = "Nothing can be computed until jax works: fix the problem above first."
        return fold(text, columns, "")
    if report.best is None:
        text = f"No dtype or quantization of {model.name} fits here. The bundled demo model does:"
    else:
        form = report.best.best
        assert form is not None
        text = f"Best here: {form.precision.name} on {report.best.budget.name}. Type:"
    lines = [*fold(text, columns, ""), f"  {report.command}"]
    if report.problems:
        lines += fold("Run the doctor again when the problems are fixed.", columns, "")
    return lines


def as_json(machine: Machine, model: Model, report: Report) -> dict[str, Any]:
    """Return the same facts for programs."""
    best = None if report.best is None else report.best.best
    return {
        "machine": dataclasses.asdict(machine),
        "findings": {
            title.lower(): [dataclasses.asdict(finding) for finding in findings]
            for title, findings in report.sections.items()
        },
        "problems": report.problems,
        "model": {
            "folder": model.folder,
            "parameters": model.config.num_params,
            "stored_as": model.scheme,
        },
        "forms": [
            {
                "precision": dataclasses.asdict(form.precision),
                "place": {
                    "platform": place.budget.platform,
                    "memory": place.budget.memory,
                    "name": place.budget.name,
                },
                "flags": flags(form.precision, model.scheme),
                "weights": form.weights,
                "cache": form.cache,
                "needs": form.total,
                "fits": place.budget.fits(form),
            }
            for place in report.places
            for form in place.forms
        ],
        "best": None if best is None else best.precision.name,
        "command": report.command,
        "exit_code": report.exit_code,
    }
