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
from infer.doctor.checkup import Finding, Model, command, examine, forms
from infer.memory.budget import Budget
from infer.memory.plan import Plan
from infer.memory.precision import flags

_MARK = 9  # columns of the mark, so that texts are aligned


@dataclass(frozen=True)
class Report:
    """Everything that was found about a machine, and about a model on it."""

    machine: Machine
    model: Model
    tuned: tuple[str, ...] = ()  # lines of `infer.tuning.kept`

    @cached_property
    def sections(self) -> dict[str, tuple[Finding, ...]]:
        found = examine(self.machine)
        measured = [Finding("ok", line) for line in self.tuned]
        none = Finding("ok", "none measured yet; a command does at the first start of a model")
        return found | {"Forms": tuple(measured or [none])}

    @cached_property
    def forms(self) -> tuple[tuple[Budget, Plan], ...]:
        return forms(self.model, self.machine)

    @cached_property
    def best(self) -> Plan | None:
        """The form that is recommended; None where none fits."""
        return next((form for budget, form in self.forms if budget.fits(form)), None)

    @property
    def command(self) -> str:
        """What to type next; "" where jax does not work at all."""
        return command(self.model, self.machine, self.best) if self.forms else ""

    @property
    def exit_code(self) -> int:
        return 0 if self.forms else EXIT_DEVICE

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
    for budget in dict.fromkeys(budget for budget, _ in report.forms):
        memory = budget.memory
        usable = "memory unknown" if memory is None else f"{human_size(memory)} to use"
        yield f"  {budget.name}, {usable}:", "  "
        for form in (form for place, form in report.forms if place == budget):
            fits = {True: "fits", False: "too large", None: "try it"}[budget.fits(form)]
            yield f"    {form.precision.name:<9} {human_size(form.total):>8}  {fits}", None
    yield "", None
    if not report.forms:
        yield "Nothing can be computed until jax works: fix the problem above first.", ""
        return
    if report.best is None:
        text = f"No dtype or quantization of {model.name} fits here. The bundled demo model does:"
        yield text, ""
    else:
        name = next(budget.name for budget, form in report.forms if form is report.best)
        yield f"Best here: {report.best.precision.name} on {name}. Type:", ""
    yield f"  {report.command}", None
    if report.problems:
        yield "Run the doctor again when the problems are fixed.", ""


def as_json(report: Report) -> dict[str, Any]:
    """Return the same facts for programs."""
    model, place = report.model, ("platform", "memory", "name")
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
                "place": {name: getattr(budget, name) for name in place},
                "flags": flags(form.precision, model.scheme),
                "weights": form.weights,
                "cache": form.cache,
                "needs": form.total,
                "fits": budget.fits(form),
            }
            for budget, form in report.forms
        ],
        "best": report.best and report.best.precision.name,
        "command": report.command,
        "exit_code": report.exit_code,
    }
