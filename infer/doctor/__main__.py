"""`python -m infer.doctor`: what this machine has, what is wrong with it, and what to type next."""

import argparse
import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from glm2_jax.choices import ROPE_KINDS
from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import path_argument, use_utf8
from glm2_jax.cli.flags import add_family
from glm2_jax.cli.main import EXIT_DEVICE
from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.escape import join_lines, json_line

if TYPE_CHECKING:
    from glm2_jax.runtime.machine import Machine
    from infer.doctor.checkup import Finding, Report
    from infer.doctor.forms import Form, Model

PROG = "python -m infer.doctor"
DESCRIPTION = """Looks at this machine and says what is wrong, which form of a model fits, and the
command that answers with it. Nothing is changed and nothing downloaded. Exit codes: 0 something
can be computed here, 2 usage, 4 the --model folder cannot be opened, 5 jax does not work."""
WIDEST = 100
MARK = 9  # columns of the mark, so that texts line up


def parser() -> Parser:
    """The flags."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=f"{PROG} --model chatglm2-6b")
    group = result.add_argument_group("model")
    group.add_argument(
        "--model",
        "-m",
        type=path_argument,
        metavar="DIR",
        help="a checkpoint folder, whose own numbers are then taken; its weights are not read "
        "(default: the numbers of a 6B model)",
    )
    group.add_argument(
        "--rope-scaling",
        choices=ROPE_KINDS,
        help="what the checkpoint's rope_ratio means, where it does not say",
    )
    add_family(group)
    output = result.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object with the same facts")
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    use_utf8()
    args = parser().parse_args(argv)
    from glm2_jax.runtime.probing import probe
    from infer.doctor.checkup import examine
    from infer.doctor.forms import Model

    model = Model() if args.model is None else _open(args)
    if sys.stderr.isatty():
        note("looking at this machine; starting jax can take a minute ...")
    machine = probe()
    report = examine(machine, model)
    if args.json:
        print(json_line(as_json(machine, model, report)))
    else:
        print(render(model, report, width()))
    return report.exit_code


def _open(args: argparse.Namespace) -> "Model":
    from convert.hub.find import find_model
    from convert.loading.folder import open_folder
    from infer.doctor.forms import Model

    found = open_folder(find_model(args.model), **from_flags(ModelChoice, args).form)
    return Model(found.config, args.model, None if found.scheme is None else found.scheme.name)


def width() -> int:
    """Columns to write in: those of the terminal, if it is not very wide."""
    return max(min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST), 20)


def render(model: "Model", report: "Report", columns: int) -> str:
    """The report for people. Commands are never broken, so that they can be copied."""
    lines = []
    for section in report.sections:
        lines += [section.title, *_findings(section.findings, columns), ""]
    tokens = min(8192, model.config.seq_length)
    lines += textwrap.wrap(f"What fits: {model.name}, with room for {tokens:,} tokens", columns)
    for table in report.tables:
        lines += _table(table, columns)
    lines += ["", *_conclusion(model, report, columns)]
    return join_lines(_without_home(line) for line in lines)


def _without_home(text: str) -> str:
    """The user's home folder as ~: shorter, and nobody's business where this is pasted."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def _findings(findings: Sequence["Finding"], columns: int) -> Iterator[str]:
    for finding in findings:
        yield from _wrapped(f"{finding.mark:<{MARK}}{finding.text}", columns)
        if finding.fix:
            yield f"  {'':<{MARK}}do this: {finding.fix}"


def _wrapped(text: str, columns: int) -> list[str]:
    # Long words (paths, versions) stay whole: a broken path is worse than a long line.
    hanging = " " * (2 + MARK)
    return textwrap.wrap(
        f"  {text}",
        columns,
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(table: Sequence["Form"], columns: int) -> Iterator[str]:
    place = table[0].place
    memory = "memory unknown" if place.memory is None else f"{human_size(place.memory)} to use"
    yield from textwrap.wrap(
        f"{place.name}, {memory}:",
        columns,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
    )
    for form in table:
        answer = {True: "fits", False: "too large", None: "try it"}[form.fits]
        yield f"    {form.precision.name:<9} {human_size(form.needs):>8}  {answer}"


def _conclusion(model: "Model", report: "Report", columns: int) -> list[str]:
    if report.exit_code == EXIT_DEVICE:
        text = "Nothing can be computed until jax works: mend the problem above first."
        return textwrap.wrap(text, columns)
    if report.best is None:
        text = f"No form of {model.name} fits here. The bundled demo model does:"
    else:
        text = f"Best here: {report.best.precision.name} on {report.best.place.name}. Type:"
    lines = [*textwrap.wrap(text, columns), f"  {report.command}"]
    if report.problems:
        lines += textwrap.wrap("Run the doctor again when the problems are mended.", columns)
    return lines


def as_json(machine: "Machine", model: "Model", report: "Report") -> dict[str, Any]:
    """The same facts for programs."""
    sections = {
        section.title.lower(): [dataclasses.asdict(finding) for finding in section.findings]
        for section in report.sections
    }
    return {
        "machine": dataclasses.asdict(machine),
        "findings": sections,
        "problems": report.problems,
        "model": {
            "folder": model.folder,
            "parameters": model.config.num_params,
            "stored_as": model.scheme,
        },
        "forms": [dataclasses.asdict(form) for table in report.tables for form in table],
        "best": None if report.best is None else report.best.precision.name,
        "command": report.command,
        "exit_code": report.exit_code,
    }


if __name__ == "__main__":
    interrupt.run(main)
