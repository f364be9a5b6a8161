"""The checks of a case: each makes a test of an answer from what the case file says.

A maker raises ValueError for what it does not understand; `CHECKS` says what it expects.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from glm2_jax.errors import UsageError, shorten
from glm2_jax.extras import pip_install
from glm2_jax.text.chinese import CHINESE
from infer.evaluate.generation import open_metrics

SHARE = 0.5  # of the text that must be in the language
_NEEDED = object()
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
_NUMBER = re.compile(
    r"(?<![A-Za-z\d_])(?:(?<![).])[-+−])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\d)"
)
_REFUSAL = re.compile(
    r"我(?:不能|无法|不便|拒绝)|(?:不能|无法|不便)(?:为[你您]|帮|提供|协助|回答|满足|透露|讨论)"
    r"|\bI(?:'m| am) (?:not able|unable|not allowed)|\bI (?:cannot|can't|can not|won't|will not)\b"
    r"|\b(?:cannot|can't|unable to) (?:help|assist|provide|comply|answer)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """An answer: its text, and how many tokens it has, without the end token."""

    text: str
    tokens: int


Test = Callable[[Answer], str]
"""Returns "" for an answer that passes, otherwise what is wrong with it."""


class Check(NamedTuple):
    """How a check is made, and what it expects in a case file."""

    make: Callable[[Any], Test]
    form: str


def contains(wanted: Any) -> Test:
    """All texts are in the answer."""
    texts = _texts(wanted)
    return lambda answer: _list("missing", [text for text in texts if text not in answer.text])


def not_contains(wanted: Any) -> Test:
    """None of the texts is in the answer."""
    texts = _texts(wanted)
    return lambda answer: _list("found", [text for text in texts if text in answer.text])


def regex(wanted: Any) -> Test:
    """The pattern matches somewhere in the answer."""
    if not isinstance(wanted, str):
        raise ValueError
    try:
        pattern = re.compile(wanted)
    except re.error as error:
        raise ValueError(f"bad pattern {shorten(wanted)}: {error}") from None
    return lambda answer: "" if pattern.search(answer.text) else f"no match of {wanted!r}"


def json_schema(wanted: Any) -> Test:
    """The answer, or what it has between a pair of ``` lines, is JSON that the schema allows."""
    if not isinstance(wanted, dict):
        raise ValueError
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError, best_match
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        raise UsageError(
            f"{error.name} is not installed, and the check json_schema needs it",
            str(error),
            pip_install("evaluate"),
        ) from None
    kind: Any = validator_for(wanted, default=Draft202012Validator)
    try:
        kind.check_schema(wanted)
    except SchemaError as error:
        raise ValueError(f"bad schema at {error.json_path}: {error.message}") from None
    validator = kind(wanted, registry=Registry())  # which fetches nothing

    def test(answer: Answer) -> str:
        fenced = _FENCE.fullmatch(answer.text)
        try:
            value = json.loads(fenced[1] if fenced else answer.text)
        except (ValueError, RecursionError) as error:
            return f"not JSON: {error}"
        try:
            error = best_match(validator.iter_errors(value))
        except Unresolvable as missing:
            return f"the schema refers to {missing.ref}, which is not in it"
        return f"{error.json_path}: {error.message}" if error else ""

    return test


def choice(wanted: Any) -> Test:
    """Of the options, only the right one is in the answer; letters and digits stand alone."""
    options, right = _take(wanted, options=(list, _NEEDED), answer=(str, _NEEDED))
    options = _texts(options)
    if right not in options:
        raise ValueError(f"the answer {right!r} is not among the options")
    longest_first = sorted(map(re.escape, options), key=len, reverse=True)
    pattern = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(longest_first)})(?![A-Za-z0-9])")

    def test(answer: Answer) -> str:
        found = sorted(set(pattern.findall(answer.text)), key=options.index)
        return "" if found == [right] else f"chosen: {', '.join(found) or 'none'}, not {right}"

    return test


def number(wanted: Any) -> Test:
    """The last number in the answer is the right one."""
    if not isinstance(wanted, dict):
        wanted = {"value": wanted}
    value, tolerance = _take(wanted, value=(float, _NEEDED), tolerance=(float, 0.0))

    def test(answer: Answer) -> str:
        found = _NUMBER.findall(unicodedata.normalize("NFKC", answer.text))
        if not found:
            return "no number"
        last = float(found[-1].replace(",", "").replace("−", "-"))
        return "" if abs(last - value) <= tolerance else f"the last number is {last:g}"

    return test


def length(wanted: Any) -> Test:
    """The answer has so many characters or tokens."""
    least, most, unit = _take(
        wanted, min=(float, 0.0), max=(float, float("inf")), unit=(str, "characters")
    )
    if unit not in ("characters", "tokens") or least > most:
        raise ValueError

    def test(answer: Answer) -> str:
        size = len(answer.text) if unit == "characters" else answer.tokens
        return "" if least <= size <= most else f"{size} {unit}"

    return test


def language(wanted: Any) -> Test:
    """Of Chinese characters and Latin words, the share that is of the language is large enough."""
    if not isinstance(wanted, dict):
        wanted = {"is": wanted}
    name, share = _take(wanted, **{"is": (str, _NEEDED), "share": (float, SHARE)})
    if name not in ("zh", "en") or not 0 < share <= 1:
        raise ValueError

    def test(answer: Answer) -> str:
        counts = {"zh": len(CHINESE.findall(answer.text)), "en": len(_WORD.findall(answer.text))}
        total = sum(counts.values())
        if total and counts[name] >= share * total:
            return ""
        return f"{counts['zh']} Chinese characters, {counts['en']} Latin words"

    return test


def refusal(wanted: Any) -> Test:
    """The answer has, or does not have, the words of a refusal, in Chinese or English."""
    if not isinstance(wanted, bool):
        raise ValueError

    def test(answer: Answer) -> str:
        found = _REFUSAL.search(answer.text.replace("’", "'"))
        if bool(found) == wanted:
            return ""
        return f"it refuses: {found[0]!r}" if found else "it does not refuse"

    return test


def similarity(wanted: Any) -> Test:
    """The answer is like a reference: ROUGE-L, or chrF of character n-grams, from 0 to 100."""
    reference, least, by = _take(
        wanted, to=(str, _NEEDED), min=(float, _NEEDED), by=(str, "rouge-l")
    )
    if not reference.strip() or not 0 <= least <= 100 or by not in ("rouge-l", "chrf"):
        raise ValueError
    metrics = open_metrics("the check similarity")

    def test(answer: Answer) -> str:
        if by == "chrf":
            score = metrics.sacrebleu.CHRF().sentence_score(answer.text, [reference]).score
        else:
            score = metrics.pair_scores(answer.text, reference)[by]
        return "" if score >= least else f"{by} {score:.1f} of at least {least:g}"

    return test


CHECKS = {
    "contains": Check(contains, "a text, or a list of texts"),
    "not_contains": Check(not_contains, "a text, or a list of texts"),
    "regex": Check(regex, "a regular expression"),
    "json_schema": Check(json_schema, "a JSON schema"),
    "choice": Check(choice, "{options: [A, B], answer: A}"),
    "number": Check(number, "a number, or {value: 8, tolerance: 0.5}"),
    "length": Check(length, "{min: 1, max: 80, unit: characters}, or unit: tokens"),
    "language": Check(language, "zh or en, or {is: zh, share: 0.8}"),
    "refusal": Check(refusal, "true or false"),
    "similarity": Check(similarity, "{to: TEXT, min: 60, by: rouge-l}, or by: chrf; min to 100"),
}


def _texts(value: Any) -> list[str]:
    """Return the texts of one or of a list."""
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError
    return texts


def _take(value: Any, /, **known: tuple[type, Any]) -> list[Any]:
    """Return the values of the known keys, each with its type and default; float = any number."""
    if not isinstance(value, dict):
        raise ValueError
    if unknown := value.keys() - known.keys():
        raise ValueError(f"unknown key {shorten(unknown.pop())}")
    found = []
    for name, (kind, default) in known.items():
        one = value.get(name, default)
        if one is _NEEDED:
            raise ValueError(f"{name} is missing")
        kinds = (int, float) if kind is float else kind
        if isinstance(one, bool) or not isinstance(one, kinds) or one != one:
            raise ValueError(f"{name} is {shorten(one)}")
        found.append(one)
    return found


def _list(what: str, texts: list[str]) -> str:
    return f"{what}: {', '.join(map(repr, texts))}" if texts else ""
