"""Matches names against regular expressions from a file, which is not trusted, in bounded time."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

_SECONDS = 10.0
_MATCHER = """
import json, re, sys
expressions, names = json.load(sys.stdin)
compiled = [re.compile(text) for text in expressions]
json.dump([[name for name in names if each.fullmatch(name)] for each in compiled], sys.stdout)
"""


def match_names(expressions: Mapping[str, str], names: Sequence[str]) -> dict[str, set[str]]:
    """Return the names that each expression matches completely.

    They are matched in a separate process, which can be stopped: `re` cannot be interrupted.

    Args:
        expressions: each expression, and the text in the file that it was made of.
        names: what is matched.

    Raises:
        ValueError: an expression is invalid or takes too long; says which and why.
    """
    if not expressions:
        return {}
    some = ", ".join(repr(text[:100]) for text in list(expressions.values())[:3])
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
    found = json.loads(done.stdout)
    return {text: set(matched) for text, matched in zip(expressions, found, strict=True)}
