"""Finds the collectives in the text of a compiled program."""

from __future__ import annotations

import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_LINE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(text: str) -> list[tuple[str, int]]:
    """Return the collectives of a program: (kind, bytes of its results on one device).

    One inside a loop, such as that over the layers, is listed once.
    """
    found = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match:
            arrays = _ARRAY.findall(match[1])
            sizes = [
                _BYTES[kind] * math.prod(int(size) for size in shape.split(",") if size)
                for kind, shape in arrays
            ]
            # The asynchronous form lists its operands before its results.
            found.append((match[2], sum(sizes[len(sizes) // 2 :] if match[3] else sizes)))
    return found
