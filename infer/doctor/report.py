"""What the doctor found, for a terminal and as JSON."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from glm2_jax.cli.main import EXIT_DEVICE
from glm2_jax.cli.messages import human_size
from glm2_jax.cli.tables import fold
from glm2_jax.escape import join_lines
from glm2_jax.runtime.machine import Machine
from infer.doctor.checkup import Finding, examine
from infer.doctor.forms import Model, Place, command, places
from infer.memory.precision import flags

_MARK = 9  # columns of the mark, so that texts are aligned


@dataclass(frozen=True)
class Report:
    """Everything that was found about a machine, and about a model on it."""

    machine: Machine
    model: Model

    @cached_property
    def sections(self) -> dict[str, tuple[Finding, ...]]:
        return examine(self.machine)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        return places(self.model, self.machine)

    @cached_property
    def best(self) -> Place | None:
        """The place whose best form is recommended; None where none fits."""
        return next((place for place in self.places if place.best), None)

    @property
    def command(self) -> str:
        """What to type next; "" where jax does not work at all."""
        form = self.best and self.best.best
        return command(self.model, self.machine, form) if self.places else ""

    @property
    def exit_code(self) -> int:
        return 0 if self.places else EXIT_DEVICE

    @property
    def problems(self) -> int:
        return sum(f.mark == "problem" for found in self.sections.values() for f in found)


def render(report: Report, columns: int) -> str:
    """Write the report for people. Commands are never broken, so that they can be copied."""
    lines = [
        line
        for text, indent in _paragraphs(report)
        for line in ([text] if indent is None else fold(text, columns, indent))
    ]
    home = os.path.expanduser("~")  # a report that is pasted elsewhere does not name the user
    return join_lines(line.replace(home, "~") if len(home) > 1 else line for line in lines)


def _paragraphs(report: Report) -> Iterator[tuple[str, str | None]]:
    """Yield each paragraph and the indent of its further lines; None = it stays one line."""
    for title, findings in report.sections.items():
        yield title, None
        for finding in findings:
            yield f"  {finding.mark:<{_MARK}}{finding.text}", " " * _MARK
            if finding.fix:
                yield f"  {'':<{_MARK}}do this: {finding.fix}", None
        yield "", None
    model = report.model
    yield f"What fits: {model.name}, with room for {model.context:,} tokens", ""
    for place in report.places:
        memory = place.budget.memory
        usable = "memory unknown" if memory is None else f"{human_size(memory)} to use"
        yield f"  {place.budget.name}, {usable}:", "  "
        for form in place.forms:
            fits = {True: "fits", False: "too large", None: "try it"}[place.budget.fits(form)]
            yield f"    {form.precision.name:<9} {human_size(form.total):>8}  {fits}", None
    yield "", None
    if not report.places:
        yield "Nothing can be computed until jax works: fix the problem above first.", ""
        return
    if report.best is None or report.best.best is None:
        yield (
            f"No dtype or quantization of {model.name} fits here. The bundled demo model does:",
            "",
        )
    else:
        name = report.best.best.precision.name
        yield f"Best here: {name} on {report.best.budget.name}. Type:", ""
    yield f"  {report.command}", None
    if report.problems:
        yield "Run the doctor again when the problems are fixed.", ""


def as_json(report: Report) -> dict[str, Any]:
    """Return the same facts for programs."""
    model, best = report.model, report.best and report.best.best
    budget = ("platform", "memory", "name")
    return {
        "machine": dataclasses.asdict(report.machine),
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
                "place": {name: getattr(place.budget, name) for name in budget},
                "flags": flags(form.precision, model.scheme),
                "weights": form.weights,
                "cache": form.cache,
                "needs": form.total,
                "fits": place.budget.fits(form),
            }
            for place in report.places
            for form in place.forms
        ],
        "best": best and best.precision.name,
        "command": report.command,
        "exit_code": report.exit_code,
    }
