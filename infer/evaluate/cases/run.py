"""Asks the cases of a file and reports which of them pass: a table, JSON, and JUnit XML."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from glm2_jax.cli.files import replace_file, require_file_place
from glm2_jax.cli.interrupt import always
from glm2_jax.cli.messages import Progress, note
from glm2_jax.cli.tables import columns, fold, table
from glm2_jax.cli.text_input import read_utf8
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.escape import escape_controls, join_lines, json_line
from glm2_jax.processes import join
from glm2_jax.text.roles import Reply
from infer.engine.params import SamplingParams
from infer.evaluate.cases.checks import Answer
from infer.evaluate.cases.read import Case, read_cases
from infer.evaluate.generation import sampling_of
from infer.requests.exchange import encode
from infer.requests.request import Request
from infer.startup import note_demo_model, open_engine

if TYPE_CHECKING:
    from infer.engine.answer import Completion
    from infer.engine.engine import Engine
    from infer.evaluate.options import Settings


@dataclass
class Attempt:
    """One run of a case: its rounds so far, and what came of it."""

    case: Case
    rounds: list[tuple[str, Reply]]
    answer: str = ""
    failures: dict[str, str] = field(default_factory=dict)  # check -> what is wrong
    error: str = ""  # why it could not be asked

    @property
    def passed(self) -> bool:
        return not self.failures and not self.error


def run(settings: Settings) -> int:
    """Ask all cases and print the result; returns 0, or 4 if one did not pass."""
    assert settings.cases is not None
    sampling, path = sampling_of(settings), settings.cases
    cases = read_cases(path)
    junit = None
    if settings.junit is not None and join.is_first():
        junit = require_file_place(settings.junit)
    note_demo_model(settings.choice)
    contents = {"case file": hashlib.sha256(read_utf8(path).encode()).hexdigest()}
    batch = settings.batch_size
    engine = open_engine(settings.choice, settings.options, rows=batch, contents=contents)
    start = time.monotonic()
    attempts = ask(engine, cases, sampling, batch, settings.repeat)
    seconds = time.monotonic() - start
    found = figures(path, cases, attempts)
    if settings.json:
        print(json_line(found, allow_nan=False), flush=True)
    else:
        print(join_lines(report(path, found)), flush=True)
    if junit is not None:
        replace_file(junit, junit_xml(path, found, seconds))
        note(f"the JUnit file is {settings.junit}")
    return 0 if found["passed"] == found["cases"] else CheckpointError.exit_code


def ask(
    engine: Engine, cases: Sequence[Case], sampling: SamplingParams, batch: int, repeat: int = 1
) -> list[Attempt]:
    """Return `repeat` attempts of each case, in the order of the cases."""
    attempts = [Attempt(case, list(case.history)) for case in cases for _ in range(repeat)]
    turns = max(len(case.prompts) for case in cases)
    with Progress("cases", len(cases)) as bar:
        for turn in range(turns):
            asked = _encoded(engine, attempts, turn, sampling)
            over = sum(bool(one.error) or len(one.case.prompts) <= turn for one in attempts)
            for one, done in _answered(engine, asked, sampling, batch, bar):
                case = one.case
                one.answer = done.text
                one.rounds.append((case.prompts[turn], done.reply))
                if turn == len(case.prompts) - 1:
                    one.failures = check(case, Answer(done.text, len(done.output_ids)))
                    over += 1
                bar(over // repeat, f"prompt {turn + 1} of {turns}" if turns > 1 else "")
    return attempts


def _encoded(
    engine: Engine, attempts: Sequence[Attempt], turn: int, sampling: SamplingParams
) -> list[tuple[Attempt, list[int]]]:
    """Return the attempts that have a prompt in this turn, and its ids; others get an error."""
    asked: list[tuple[Attempt, list[int]]] = []
    for one in attempts:
        if turn >= len(one.case.prompts) or one.error:
            continue
        try:
            request = Request(one.case.prompts[turn], tuple(one.rounds), one.case.system)
            asked.append((one, encode(engine, request, sampling, None, one.case.name)))
        except (InputError, UsageError) as error:
            one.error = error.cause
    return asked


def _answered(
    engine: Engine,
    asked: Sequence[tuple[Attempt, list[int]]],
    sampling: SamplingParams,
    batch: int,
    bar: Progress,
) -> Iterator[tuple[Attempt, Completion]]:
    """Yield the attempts with what the model answers, `batch` at a time, the longest first."""
    order = sorted(range(len(asked)), key=lambda row: -len(asked[row][1]))
    for first in range(0, len(order), batch):
        numbers = order[first : first + batch]
        ids = [asked[number][1] for number in numbers]
        found = engine.complete(ids, sampling, row_ids=numbers, clean=engine.written.chat)
        bar.start += max(one.stats.compile_s for one in found)  # not part of the rate
        yield from ((asked[number][0], one) for number, one in zip(numbers, found, strict=True))


def check(case: Case, answer: Answer) -> dict[str, str]:
    """Return what is wrong with an answer by the names of the checks.

    An interruption names the check that is running: a regular expression may take for ever.
    """
    failures, running = dict[str, str](), ""

    def tell() -> None:
        if running:
            note(f"stopped in case {case.name}, line {case.line}, at its check {running}")

    with always(tell):
        for running, test in case.tests.items():
            if why := test(answer):
                failures[running] = why
        running = ""
    return failures


def figures(path: str, cases: Sequence[Case], attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Return what came of all cases, as `--json` prints it."""
    repeat = len(attempts) // len(cases)
    results = []
    for at, case in enumerate(cases):
        own = attempts[at * repeat : (at + 1) * repeat]
        results.append(
            {
                "case": case.name,
                "group": case.group,
                "line": case.line,
                "checks": list(case.tests),
                "passed": all(one.passed for one in own),
                "answers": [
                    {"text": one.answer, "failures": one.failures}
                    | ({"error": one.error} if one.error else {})
                    for one in own
                ],
            }
        )
    passed = sum(result["passed"] for result in results)
    return {
        "task": "cases",
        "file": path,
        "cases": len(cases),
        "passed": passed,
        "failed": len(cases) - passed,
        "repeat": repeat,
        "results": results,
    }


def report(path: str, found: dict[str, Any]) -> list[str]:
    """Return the lines of a table of all cases, and of those that failed."""
    rows = [("result", "group", "case", "checks", "passed")]
    failed = []
    for result in found["results"]:
        answers = result["answers"]
        good = sum(not one["failures"] and "error" not in one for one in answers)
        state = "pass" if result["passed"] else "FAIL"
        group, name = escape_controls(result["group"]), escape_controls(result["case"])
        checks = ", ".join(result["checks"])
        rows.append((state, group, name, checks, f"{good}/{len(answers)}"))
        if not result["passed"]:
            failed += ["", f"{path}:{result['line']}: {result['case']}"]
            failed += [line for one in answers for line in _wrong(one)]
    total = f"{found['passed']} of {found['cases']} cases passed"
    return [*table(rows, texts=4), *failed, "", total]


def _wrong(answer: dict[str, Any]) -> list[str]:
    """Return the lines about an answer for a terminal, none if it passed."""
    return [line for one in _about(answer) for line in fold(f"  {one}", columns())]


def _about(answer: dict[str, Any]) -> list[str]:
    """Return the answer and what is wrong with it, none if it passed."""
    shown = [] if "error" in answer or not answer["failures"] else [f"answer: {answer['text']!r}"]
    return [*shown, *_reasons(answer)]


def _reasons(answer: dict[str, Any]) -> list[str]:
    """Return what is wrong with an answer: all checks that failed."""
    if "error" in answer:
        return [f"could not be asked: {answer['error']}"]
    return [f"{name}: {why}" for name, why in answer["failures"].items()]


def junit_xml(path: str, found: dict[str, Any], seconds: float) -> bytes:
    """Return the result in the form of JUnit: one suite, a test for each case."""
    broken = [any("error" in one for one in r["answers"]) for r in found["results"]]
    counts = {
        "name": escape_controls(path),
        "tests": str(found["cases"]),
        "failures": str(found["failed"] - sum(broken)),
        "errors": str(sum(broken)),
        "time": f"{seconds:.3f}",
    }
    suites = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(suites, "testsuite", counts)
    for result, error in zip(found["results"], broken, strict=True):
        names = {"classname": result["group"], "name": result["case"], "line": str(result["line"])}
        names = {key: escape_controls(text) for key, text in names.items()}
        test = ElementTree.SubElement(suite, "testcase", names)
        if not result["passed"]:
            lines = [line for one in result["answers"] for line in _about(one)]
            reasons = [reason for one in result["answers"] for reason in _reasons(one)]
            wrong = {"message": escape_controls("; ".join(dict.fromkeys(reasons)))}
            node = ElementTree.SubElement(test, "error" if error else "failure", wrong)
            node.text = join_lines(lines)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n"
