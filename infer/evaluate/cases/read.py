"""Reads a case file: YAML, a list of cases; errors name the file, the line and the case."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from glm2_jax.cli.text_input import read_utf8
from glm2_jax.errors import InputError, shorten
from glm2_jax.text.roles import Turns, parse_history
from infer.evaluate.cases.checks import CHECKS, Test
from infer.requests.request import Request

FORM = "Write a list of cases, such as - {name: sum, prompt: 3+5=?, checks: {number: 8}}."
_KEYS = ("name", "group", "prompt", "history", "system", "checks")


class _Entry(NamedTuple):
    """A value in a mapping, and the line of its name."""

    line: int
    node: yaml.Node
    value: Any


@dataclass(frozen=True)
class Case:
    """A conversation, and the tests that its last answer has to pass.

    The model answers the prompts one after another, each with the earlier answers as history.
    """

    name: str
    line: int
    group: str
    prompts: tuple[str, ...]
    history: Turns
    system: str | None
    tests: Mapping[str, Test]


def read_cases(path: str) -> list[Case]:
    """Return the cases of a file, at least one; InputError says what is wrong, and where."""
    text = read_utf8(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.SequenceNode) or not root.value:
            raise InputError(f"{path} has no cases", fix=FORM)
        reader = _Reader(path, loader)
        cases = [reader.case(node) for node in root.value]
    except RecursionError:
        raise InputError(f"{path} is nested too deeply", fix=FORM) from None
    except (yaml.YAMLError, ValueError) as error:  # such as a date that does not exist
        raise InputError(f"{path} is not YAML", " ".join(str(error).split()), FORM) from None
    lines: dict[str, int] = {}
    for case in cases:
        if (first := lines.setdefault(case.name, case.line)) != case.line:
            why = f"line {first} has a case of that name"
            raise InputError(f"{path}:{case.line}: case {case.name}", why, "Give it another name.")
    return cases


class _Reader:
    """Reads the cases of one file."""

    def __init__(self, path: str, loader: yaml.SafeLoader):
        self.path, self.loader, self.name = path, loader, ""

    def case(self, node: yaml.Node) -> Case:
        """Return a case; InputError with its place."""
        self.name, line = "", node.start_mark.line + 1
        found = self._entries(node)
        name = found["name"].value if "name" in found else None
        if not isinstance(name, str) or not name.strip():
            raise self._bad(line, "a case needs a name", "expected a text", FORM)
        self.name = name
        for key, entry in found.items():
            if key not in _KEYS:
                raise self._bad(entry.line, f"unknown key {shorten(key)}", *_near(key, _KEYS))
        if "checks" not in found:
            raise self._bad(line, "checks is missing", f"known: {', '.join(CHECKS)}", FORM)
        value = {key: entry.value for key, entry in found.items()}
        return Case(name, line, *self._asked(line, value), self._tests(found["checks"].node))

    def _asked(
        self, line: int, value: Mapping[str, Any]
    ) -> tuple[str, tuple[str, ...], Turns, str | None]:
        """Return the group, the prompts, the history and the system text of a case."""
        prompts: Any = value.get("prompt")
        prompts = prompts if isinstance(prompts, list) else [prompts]
        if not prompts or not all(isinstance(one, str) for one in prompts):
            what = "prompt is missing" if prompts == [None] else f"prompt is {shorten(prompts)}"
            why = "expected a text, or a list of texts that are asked one after another"
            raise self._bad(line, what, why, "Put numbers and yes, no, true in quotes.")
        group, system = value.get("group", "cases"), value.get("system")
        for name, one in (("group", group), ("system", system)):
            if not isinstance(one, str | None):
                what = f"{name} is {shorten(one)}"
                raise self._bad(line, what, "expected a text", "Put it in quotes.")
        try:
            history = parse_history(value["history"]) if "history" in value else ()
            for prompt in prompts:
                Request(prompt, history, system)
        except InputError as error:
            raise self._bad(line, error.what, error.why, error.fix) from None
        return group or "cases", tuple(prompts), history, system

    def _tests(self, node: yaml.Node) -> dict[str, Test]:
        """Return the tests of a case by the names of their checks."""
        tests = {}
        for name, entry in self._entries(node).items():
            if name not in CHECKS:
                raise self._bad(entry.line, f"unknown check {shorten(name)}", *_near(name, CHECKS))
            check = CHECKS[name]
            try:
                tests[name] = check.make(entry.value)
            except ValueError as error:
                why = str(error) or f"got {shorten(entry.value)}"
                raise self._bad(
                    entry.line, f"check {name}", why, f"Expected {check.form}."
                ) from None
        if not tests:
            known = f"known: {', '.join(CHECKS)}"
            raise self._bad(node.start_mark.line + 1, "checks is empty", known, FORM)
        return tests

    def _entries(self, node: yaml.Node) -> dict[str, _Entry]:
        """Return the entries of a mapping by their names."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            got = f"got {shorten(self.loader.construct_object(node, deep=True))}"
            raise self._bad(line, "expected names and values", got, FORM)
        found: dict[str, _Entry] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in found:
                raise self._bad(line, f"{name} is given twice", f"first in line {found[name].line}")
            found[name] = _Entry(line, value, self.loader.construct_object(value, deep=True))
        return found

    def _bad(self, line: int, what: str, why: str = "", fix: str = "") -> InputError:
        case = f" case {self.name}:" if self.name else ""
        return InputError(f"{self.path}:{line}:{case} {what}", why, fix)


def _near(name: str, known: Any) -> tuple[str, str]:
    """Return why a name is not known, and what to do."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"known: {', '.join(known)}", f"Did you mean {near[0]}?" if near else "Correct it."
