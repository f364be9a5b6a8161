"""What the user's cache holds of choices of forms, for people; needs no jax."""

from __future__ import annotations

import contextlib
import json

from glm2_jax.runtime.compile_cache import user_cache

VARIABLE = "GLM2_JAX_TUNED"  # folder; "off" = nothing is kept


def kept_lines() -> tuple[str, ...]:
    """Return a line for each device and model: what is not computed in its usual form, and by how
    much that is faster. Files that are no choices are left out."""
    folder = None
    with contextlib.suppress(RuntimeError):  # no home folder
        folder = user_cache("tuned", VARIABLE)
    lines = []
    for path in sorted(folder.glob("*.json")) if folder is not None else ():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            lines.append(_line(json.loads(path.read_text(encoding="utf-8"))))
    return tuple(lines)


def _line(found: dict) -> str:
    key, tuned = found["key"], found["tuned"]
    measured = [*tuned["measured"], *(line for one in tuned["training"] for line in one[2:])]
    model = key["model"]
    changed = [
        f"{what}: {choice['name']} ({seconds[choice['usual']] / seconds[choice['name']]:.2f} times)"
        for what, choice in measured
        if (seconds := choice["seconds"]) and choice["name"] != choice["usual"]
    ]
    dtype, scheme = key["weights"]
    stored = dtype if scheme is None else f"{dtype}, {scheme}"
    return (
        f"{model['hidden_size']} wide, {stored}, on {key['device']}: "
        f"{'; '.join(changed) or 'the usual forms are the fastest'}"
    )
