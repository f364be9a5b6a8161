"""Reads a case file: YAML, a list of cases; errors name the file, the line and the case."""

from __future__ import annotations

import datetime
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
_KINDS = (  # what YAML makes of an entry that is no text; a truth value is an int, too
    (bool, "a truth value"),
    ((int, float), "a number"),
    (datetime.date, "a date"),
    (list, "a list"),
    (dict, "a mapping"),
)
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
        if "name" not in found:
            raise self._bad(line, "a case needs a name", "name is missing", FORM)
        self.name = name = self._text("name", found["name"])
        if not name.strip():
            raise self._bad(found["name"].line, "name is empty", "a case needs a name", FORM)
        for key, entry in found.items():
            if key not in _KEYS:
                raise self._bad(entry.line, f"unknown key {shorten(key)}", *_near(key, _KEYS))
        if "checks" not in found:
            raise self._bad(line, "checks is missing", f"known: {', '.join(CHECKS)}", FORM)
        return Case(name, line, *self._asked(line, found), self._tests(found["checks"].node))

    def _asked(
        self, line: int, found: Mapping[str, _Entry]
    ) -> tuple[str, tuple[str, ...], Turns, str | None]:
        """Return the group, the prompts, the history and the system text of a case."""
        prompts = self._prompts(line, found.get("prompt"))
        texts: dict[str, str | None] = {"group": None, "system": None}
        for name in texts:
            if name in found and found[name].value is not None:
                texts[name] = self._text(name, found[name])
        history: Turns = ()
        for name in ("history", "system"):
            if name not in found:
                continue
            try:
                if name == "history":
                    history = parse_history(found[name].value)
                Request(prompts[0], history, texts["system"] if name == "system" else None)
            except InputError as error:
                raise self._bad(found[name].line, error.what, error.why, error.fix) from None
        return texts["group"] or "cases", prompts, history, texts["system"]

    def _prompts(self, line: int, entry: _Entry | None) -> tuple[str, ...]:
        """Return the prompts of a case, at least one."""
        why = "expected a text, or a list of texts that are asked one after another"
        if entry is None or entry.value is None or entry.value == []:
            at = line if entry is None else entry.line
            raise self._bad(at, f"prompt is {'missing' if entry is None else 'empty'}", why, FORM)
        entries = [entry]
        if isinstance(entry.value, list):
            nodes = zip(entry.node.value, entry.value, strict=True)
            entries = [_Entry(node.start_mark.line + 1, node, value) for node, value in nodes]
        prompts = []
        for one in entries:
            prompts.append(self._text("prompt", one))
            try:
                Request(prompts[-1])
            except InputError as error:
                raise self._bad(one.line, error.what, error.why, error.fix) from None
        return tuple(prompts)

    def _text(self, name: str, entry: _Entry) -> str:
        """Return the text of an entry; InputError says what it is instead, and how to write it."""
        value, node = entry.value, entry.node
        if isinstance(value, str):
            return value
        if value is None:
            raise self._bad(entry.line, f"{name} is empty", "expected a text", "Write a text.")
        kind = next((word for kinds, word in _KINDS if isinstance(value, kinds)), "no text")
        what, fix = f"{name} is {kind}, {shorten(value)}", "Write a text."
        if isinstance(node, yaml.ScalarNode):
            what, fix = f"{name}: {node.value} is {kind}", f'Put it in quotes: "{node.value}".'
        raise self._bad(entry.line, what, "expected a text", fix)

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
