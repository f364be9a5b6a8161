"""Matches names against regular expressions from a file, which is not trusted, in bounded time."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

# Without a repetition no expression takes long; others run in a process that can be stopped.
_PLAIN = re.compile(r"[\w.^$\\-]{1,500}")
_MANY = 1000  # even plain expressions take long if there are enough of them
_SECONDS = 10.0
_MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
compiled = [getattr(re.compile(text), how) for how, text in patterns]
json.dump([[name for name in names if match(name)] for match in compiled], sys.stdout)
"""


class Pattern(NamedTuple):
    """A regular expression and the method that applies it to a name."""

    how: Literal["match", "fullmatch"]
    text: str


def match_names(
    patterns: Iterable[tuple[str, Pattern]], names: Sequence[str]
) -> dict[Pattern, set[str]]:
    """Return the names that each pattern matches.

    Args:
        patterns: (the text from the file, the pattern that was made of it).
        names: what is matched.

    Raises:
        ValueError: an invalid expression, or one that takes too long; says which and why.
    """
    wanted = {pattern: text for text, pattern in patterns}
    if len(wanted) <= _MANY and all(map(_PLAIN.fullmatch, wanted.values())):
        return {pattern: _match(pattern, text, names) for pattern, text in wanted.items()}
    found = _match_apart(wanted, names)
    return {pattern: set(matched) for pattern, matched in zip(wanted, found, strict=True)}


def _match(pattern: Pattern, text: str, names: Sequence[str]) -> set[str]:
    try:
        match = getattr(re.compile(pattern.text), pattern.how)
    except re.error as error:
        raise ValueError(f"{text[:100]!r} is not a regular expression: {error}") from error
    return {name for name in names if match(name)}


def _match_apart(wanted: dict[Pattern, str], names: Sequence[str]) -> list[list[str]]:
    """Match in a process of its own, which ends after a while: `re` cannot be interrupted."""
    some = ", ".join(repr(text[:100]) for text in list(wanted.values())[:3])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([list(wanted), names]).encode(),
            capture_output=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{some}: matching {len(names)} names takes more than {_SECONDS:g} s"
        ) from None
    except OSError as error:
        raise ValueError(f"{some} cannot be matched: no process can be started: {error}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1][:200] if lines else f"exit code {done.returncode}"
        raise ValueError(f"{some} cannot be matched: {reason}")
    return json.loads(done.stdout)
