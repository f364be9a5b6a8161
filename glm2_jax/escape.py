"""Escapes text from outside for a terminal or a line of JSON."""

import json
import re
from collections.abc import Iterable
from typing import Any

# C0, DEL and C1; other line separators; changes of the writing direction; lone surrogates.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str, keep: str = "") -> str:
    """Escape what a terminal would obey or show as another line, but not the characters `keep`."""
    return _CONTROLS.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(),
        text,
    )


def join_lines(lines: Iterable[str]) -> str:
    """Join the lines of a message or report; a newline inside a line is escaped."""
    return "\n".join(map(escape_controls, lines))


def json_line(value: Any, *, allow_nan: bool = True) -> str:
    """Return a value as one line of JSON, with control characters escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=allow_nan)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
