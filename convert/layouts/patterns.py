"""Matches names against regular expressions from a file, which is not trusted, in bounded time."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

# Without a repetition no expression takes long; others run in a process that can be stopped,
# because `re` cannot be interrupted.
_PLAIN = re.compile(r"[\w.^$\\-]{1,500}")
_MANY = 1000  # even plain expressions take long if there are enough of them
_SECONDS = 10.0
_MATCHER = """
import json, re, sys
expressions, names = json.load(sys.stdin)
compiled = [re.compile(text) for text in expressions]
json.dump([[name for name in names if each.fullmatch(name)] for each in compiled], sys.stdout)
"""


def match_names(expressions: Mapping[str, str], names: Sequence[str]) -> dict[str, set[str]]:
    """Return the names that each expression matches completely.

    Args:
        expressions: each expression, and the text in the file that it was made of.
        names: what is matched.

    Raises:
        ValueError: an expression is invalid or takes too long; says which and why.
    """
    some = ", ".join(repr(text[:100]) for text in list(expressions.values())[:3])
    if len(expressions) <= _MANY and all(map(_PLAIN.fullmatch, expressions.values())):
        try:
            compiled = [re.compile(expression) for expression in expressions]
        except re.error as error:
            raise ValueError(f"{some} cannot be matched: {error}") from error
        found = [filter(each.fullmatch, names) for each in compiled]
    else:
        found = _match_apart(expressions, names, some)
    return {each: set(matched) for each, matched in zip(expressions, found, strict=True)}


def _match_apart(
    expressions: Mapping[str, str], names: Sequence[str], some: str
) -> list[list[str]]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([list(expressions), names]).encode(),
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
