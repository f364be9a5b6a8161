"""`python -m infer.evaluate --task cases`: the checks, case files, and what is reported."""

import json
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from glm2_jax.cli.messages import Progress
from glm2_jax.errors import InputError, UsageError
from infer.evaluate.__main__ import main
from infer.evaluate.cases.checks import CHECKS, Answer
from infer.evaluate.cases.read import read_cases
from infer.evaluate.cases.run import Attempt, check, figures, junit_xml
from tests.support.paths import ROOT

DEMO = ROOT / "examples" / "cases" / "demo.yml"
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
}


@pytest.mark.parametrize(
    ("check", "wanted", "good", "bad"),
    [
        ("contains", ["a", "b"], ["ba"], ["a", ""]),
        ("not_contains", "a", ["b", ""], ["ba"]),
        ("regex", r"^\d{3}$", ["123"], ["1234", "a123"]),
        ("json_schema", PERSON, ['{"age": 3}', '```json\n{"age": 3}\n```\n'],
         ['{"age": -1}', "{}", "age 3", "[" * 9999]),
        ("json_schema", {"$ref": "http://127.0.0.1:1/none"}, [], ["{}"]),
        ("choice", {"options": ["A", "B"], "answer": "A"}, ["A", "答案是A。", "(A) it is A"],
         ["B", "A or B", "AB", "Apple", ""]),
        ("choice", {"options": ["是", "不是"], "answer": "不是"}, ["不是。"], ["是", "是不是"]),
        ("number", 8, ["3+5=8。", "８", "8.0", "x = 8e0"], ["9", "glm8", "", "18", "8 of 9"]),
        ("number", {"value": -1234.5, "tolerance": 0.5}, ["是-1,234", "−1235"], ["1234", "-1236"]),
        ("number", 3, ["5-2=3", "1-3"], ["-3", "= -3"]),
        ("length", {"min": 2, "max": 3}, ["ab", "你好吗"], ["a", "abcd"]),
        ("length", {"max": 3, "unit": "tokens"}, ["a"], ["four words are here"]),
        ("language", "zh", ["你好", "用 JAX 写的"], ["hello", "3", "a b 是"]),
        ("language", {"is": "en", "share": 0.9}, ["it isn't much"], ["这 is it"]),
        ("refusal", True, ["我无法回答。", "I’m unable to say", "We cannot help"],
         ["好的", "I can"]),
        ("refusal", False, ["好的", "不能太晚"], ["我不能说", "I won't"]),
        ("similarity", {"to": "天气很好", "min": 100}, ["天气很好"], ["下雨", ""]),
        ("similarity", {"to": "abcdef", "min": 50, "by": "chrf"}, ["abcde"], ["xyz"]),
    ],
)  # fmt: skip
def test_checks(check, wanted, good, bad):
    test = CHECKS[check].make(wanted)
    for text in good + bad:
        found = test(Answer(text, len(text.split())))
        assert (found == "") == (text in good), (text, found)


def one(checks: str) -> str:
    return f"- name: sum\n  prompt: 3+5=?\n  checks:\n    {checks}\n"


def asked(lines: str) -> str:
    return f"- name: sum\n  checks: {{number: 8}}\n  {lines}\n"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: b", 0, "has no cases"),
        ("[", 0, "is not YAML"),
        ("- name: 2024-99-99", 0, "is not YAML"),
        ("- name: !!python/name:os.system", 0, "is not YAML"),
        ("- [x]", 1, "expected names and values"),
        ("- prompt: a", 1, "a case needs a name"),
        ("- name: sum\n  checks: {number: 8}", 1, "case sum: prompt is missing"),
        ("- prompt: a\n  name: 12", 2, '(?s)name: 12 is a number.*a text.*in quotes: "12"'),
        ("- prompt: a\n  name: yes", 2, '(?s)name: yes is a truth value.*in quotes: "yes"'),
        ("- prompt: a\n  name: [b]", 2, r"(?s)name is a list, \['b'\].*Write a text"),
        ("- prompt: a\n  name:", 2, "name is empty"),
        ("- prompt: a\n  name: ' '", 2, "name is empty"),
        (asked("prompt: 8"), 3, '(?s)case sum: prompt: 8 is a number.*in quotes: "8"'),
        (asked("prompt: [a,\n   2024-01-01]"), 4, "prompt: 2024-01-01 is a date"),
        (asked("prompt: ' '"), 3, "case sum: The prompt is empty"),
        (asked("prompt:\n  - a\n  - ''"), 5, "case sum: The prompt is empty"),
        (asked("prompt: []"), 3, "case sum: prompt is empty"),
        (asked("prompt: a\n  history: [b]"), 4, "case sum: "),
        (asked("prompt: a\n  system: 8"), 4, "case sum: system: 8 is a number"),
        (asked('prompt: a\n  system: "\\ud800"'), 4, "case sum: "),
        ("- name: sum\n  prompt: a", 1, "case sum: checks is missing"),
        ("- name: sum\n  promt: a", 2, "(?s)case sum: unknown key 'promt'.*mean prompt"),
        ("- name: sum\n  name: b", 2, "name is given twice\nfirst in line 1"),
        (one("{}"), 4, "case sum: checks is empty"),
        (one("contain: a"), 4, "(?s)case sum: unknown check 'contain'.*mean contains"),
        (one("contains: yes"), 4, "(?s)check contains\ngot True\nExpected a text"),
        (one("regex: '(a'"), 4, "(?s)check regex\nbad pattern '.a'.*regular expression"),
        (one("json_schema: {type: 3}"), 4, r"check json_schema\nbad schema at \$.type: 3"),
        (one("json_schema: {pattern: (}"), 4, r"bad schema at \$.pattern"),
        (one("choice: {options: [A], answer: B}"), 4, "'B' is not among the options"),
        (one("number: {value: x}"), 4, "check number\nvalue is 'x'\nExpected a number"),
        (one("length: {most: 3}"), 4, "check length\nunknown key 'most'"),
        (one("similarity: {to: a}"), 4, "min is missing"),
        (one("language: fr"), 4, "Expected zh or en"),
        (one("number: 8") + one("number: 8"), 5, "line 1 has a case of that name"),
    ],
)
def test_case_files_with_mistakes(tmp_path, text, line, said):
    path = tmp_path / "cases.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said) as error:
        read_cases(str(path))
    assert str(error.value).startswith(f"{path}:{line}: " if line else f"{path} ")


def test_flags_that_do_not_fit(monkeypatch):
    task = ["--task", "cases"]
    for flags, said in (
        (task, "needs --cases"),
        (["--cases", "a.yml"], "--cases needs --task cases"),
        (
            ["--task", "cases", "--cases", "a.yml", "--repeat", "2"],
            "--repeat 2 needs --temperature",
        ),
        (["--task", "cases", "--cases", "a.yml", "--data", "b"], "--data needs --task perplexity"),
    ):
        with pytest.raises(UsageError, match=said):
            main(flags)
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(UsageError, match=r"(?s)jsonschema.*pip install jieba jsonschema"):
        CHECKS["json_schema"].make({})


def test_the_demo_passes_its_cases(tmp_path, capsys):
    """CI runs the cases of the demo model here."""
    junit = tmp_path / "cases.xml"
    code = main(["--task", "cases", "--cases", str(DEMO), "--junit", str(junit)])
    assert code == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "14 of 14 cases passed" in out and "FAIL" not in out
    suite = ElementTree.parse(junit).getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("14", "0", "0")
    names = [test.get("name") for test in suite.iter("testcase")]
    assert names == [case.name for case in read_cases(str(DEMO))]
    groups = {test.get("classname") for test in suite.iter("testcase")}
    topics = "customer service, summary, translation, extraction, arithmetic, safety"
    assert groups == set(topics.split(", "))


def test_an_interruption_names_the_case_and_the_check(tmp_path, capsys):
    path = tmp_path / "cases.yml"
    path.write_text(one("{number: 8, regex: '(a+)+b'}"), encoding="utf-8")
    (case,) = read_cases(str(path))
    assert list(check(case, Answer("aac", 1))) == ["number", "regex"]
    assert capsys.readouterr().err == ""

    def endless(answer: Answer) -> str:
        raise KeyboardInterrupt

    stuck = replace(case, tests={**case.tests, "regex": endless})
    with pytest.raises(KeyboardInterrupt):
        check(stuck, Answer("8", 1))
    assert "stopped in case sum, line 1, at its check regex\n" in capsys.readouterr().err


def test_junit_names_all_failed_checks_whatever_the_terminal(tmp_path, monkeypatch):
    path = tmp_path / "cases.yml"
    path.write_text(one("{number: 8, contains: [eight eight, nine nine]}"), encoding="utf-8")
    cases = read_cases(str(path))
    tests = cases[0].tests
    failures = {name: test(Answer("nothing at all", 3)) for name, test in tests.items()}
    found = figures(str(path), cases, [Attempt(cases[0], [], "nothing at all", failures)] * 2)
    texts = []
    for columns in ("40", "160"):
        monkeypatch.setenv("COLUMNS", columns)
        texts.append(junit_xml(str(path), found, 1.0))
    assert texts[0] == texts[1]
    (failure,) = ElementTree.fromstring(texts[0]).iter("failure")
    said = "contains: missing: 'eight eight', 'nine nine'"
    assert failure.get("message") == f"number: no number; {said}"
    assert (failure.text or "").splitlines().count(said) == 2


def test_rounds_repeats_failures_and_errors(toy, tmp_path, capsys, monkeypatch):
    shown: list[tuple[str, float, float, str]] = []

    def show(bar: Progress, done: float, more: str = "") -> None:
        shown.append((bar.label, done, bar.total, more))

    monkeypatch.setattr(Progress, "__call__", show)
    path, junit = tmp_path / "cases.yml", tmp_path / "cases.xml"
    cases = [
        {"name": "rounds", "prompt": ["你好", "今天"], "checks": {"length": {"max": 1000}}},
        {"name": "fails \x1b[1m", "prompt": "天气", "checks": {"contains": "不在 <&> \x07"}},
        {"name": "too long", "prompt": "世" * 400, "checks": {"number": 8}},
    ]
    path.write_text(json.dumps(cases), encoding="utf-8")  # JSON is YAML
    flags = ["--task", "cases", "--cases", str(path), "--max-new-tokens", "4", "--batch-size", "1"]
    assert main([*flags, "--json", "--junit", str(junit)]) == 4
    found = json.loads(capsys.readouterr().out)
    assert [row["passed"] for row in found["results"]] == [True, False, False]
    first, *_, before, last = (one for one in shown if one[0] == "cases")
    assert first[1] >= 1  # one could not be asked
    assert before == ("cases", 2, 3, "prompt 1 of 2") and last == ("cases", 3, 3, "prompt 2 of 2")
    greedy = {"temperature": 0, "max_new_tokens": 4}
    _, history = toy.chat("你好", **greedy)
    assert found["results"][0]["answers"][0]["text"] == toy.chat("今天", history, **greedy)[0]
    suite = ElementTree.parse(junit).getroot()[0]
    assert (suite.get("failures"), suite.get("errors")) == ("1", "1")
    assert "contains: missing: '不在 <&> \\x07'" in suite[1][0].get("message", "")
    assert "could not be asked: The prompt is too long" in (suite[2][0].text or "")
    assert main([*flags, "--temperature", "5", "--repeat", "3"]) == 4
    out = capsys.readouterr().out
    assert "\x1b" not in out and "1 of 3 cases passed" in out and f"{path}:1: fails" in out
    texts = {line for line in out.splitlines() if line.startswith("  answer: ")}
    assert len(texts) > 1 and " 3/3\n" in out and " 0/3\n" in out
