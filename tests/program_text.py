"""What the text of a compiled program says of talk between devices."""

import math
import re
from typing import NamedTuple

_RESULT = re.compile(
    r" = \(?(\w+)\[([\d,]*)\].* "
    r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


class Collective(NamedTuple):
    """One instruction."""

    kind: str
    dtype: str
    elements: int  # of its first result, on one device
    looped: bool  # whether it stands in the body of a loop


def collectives(text: str) -> list[Collective]:
    """The collectives of a program."""
    bodies = set(re.findall(r"body=%?([^\s,]+)", text))
    found, where = [], ""
    for line in text.splitlines():
        header = re.match(r"%?(\S+) \(.*\{$", line)
        where = header[1] if header else where
        match = _RESULT.search(line)
        if match:
            elements = math.prod(int(size) for size in match[2].split(",") if size)
            found.append(Collective(match[3], match[1], elements, where in bodies))
        if line.startswith("ENTRY"):
            where = ""
    return found


def kinds(found: list[Collective], looped: bool) -> dict[str, int]:
    """Kind -> how many there are inside of loops, or outside of them."""
    chosen = [one.kind for one in found if one.looped == looped]
    return {kind: chosen.count(kind) for kind in sorted(set(chosen))}
