"""Finds the collectives and the matrix products in the text of a compiled program."""

import math
import re
from typing import NamedTuple

_RESULTS = re.compile(
    r" = (\S.*?) "
    r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("
)
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?(\S+) \(.*\{$")
_SHAPE = re.compile(r"%?(\S+) = \S*?\[([\d,]*)\]")
_DOT = re.compile(r" = \S*?\[([\d,]*)\]\S* dot\(%?([^\s,)]+),.*?lhs_contracting_dims=\{([\d,]*)\}")
_CALLED = re.compile(r"(body|calls|to_apply|\w+_computations?)=(\{[^}]*\}|[^\s,]+)")
_COUNT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
# XLA:TPU of libtpu 0.0.52 cannot write down a program that fetches rows of the embedding by the
# chip's SparseCore, as a v5p does for many tokens. Without that the rest is the same.
READABLE: dict[str, str | bool] = {"xla_tpu_offload_gather_to_sparsecore": "false"}

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2}  # bytes; of all others 4
Computations = dict[str, list[str]]  # name -> instructions; "" is the program's own


class Collective(NamedTuple):
    """One collective, which may be several instructions of one channel."""

    kind: str
    elements: int  # of its largest result, on one device
    size: int  # bytes of all its results, on one device
    group: int  # devices that talk to each other
    looped: bool  # whether it is inside a loop
    times: int  # that it runs; a loop whose count the text does not give counts once

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all these times, around a ring."""
        others = self.group - 1
        parts = {
            "all-reduce": 2 * others / self.group,
            "reduce-scatter": others,  # its result is but one part
            "collective-permute": 1,
        }
        return parts.get(self.kind, others / self.group) * self.size * self.times


def collectives(text: str) -> list[Collective]:
    """The collectives of a program."""
    computations = _computations(text)
    places, found = _places(computations), {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            match = _RESULTS.search(line)
            if match is None:
                continue
            arrays = [
                (kind, _product(shape.split(","))) for kind, shape in _ARRAY.findall(match[1])
            ]
            sizes = [_SIZES.get(kind, 4) * elements for kind, elements in arrays]
            size = max(sizes) if match[3] else sum(sizes)  # what starts lists its operands, too
            elements = max(elements for _, elements in arrays)
            channel = re.search(r"channel_id=(\d+)", line)
            one = Collective(match[2], elements, size, _group(line), *places[name])
            # A TPU makes steps of one collective, fused with what it does meanwhile.
            found.setdefault(channel[1] if channel else (name, number), one)
    return list(found.values())


def operations(text: str) -> int:
    """The operations of all matrix products, 2 for each multiply-add, in all times that they run;
    those of a branch count as if it were taken."""
    computations, total = _computations(text), 0
    places = _places(computations)
    for name, lines in computations.items():
        shapes = {found[1]: found[2] for line in lines if (found := _SHAPE.search(line))}
        for line in lines:
            if dot := _DOT.search(line):
                summed = shapes[dot[2]].split(",")
                summed = [summed[int(axis)] for axis in dot[3].split(",") if axis]
                total += 2 * _product([*dot[1].split(","), *summed]) * places[name][1]
    return total


def _computations(text: str) -> Computations:
    computations: Computations = {"": []}
    where = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            where = "" if header[1] else header[2]
        computations.setdefault(where, []).append(line)
    return computations


def kinds(found: list[Collective], looped: bool) -> dict[str, int]:
    """Kind -> how many there are inside of loops, or outside of them."""
    chosen = [one.kind for one in found if one.looped == looped]
    return {kind: chosen.count(kind) for kind in sorted(set(chosen))}


def _places(computations: Computations) -> dict[str, tuple[bool, int]]:
    """Name -> whether it is inside a loop, and how often it runs."""
    found = {name: (False, 0) for name in computations}

    def visit(name: str, looped: bool, times: int) -> None:
        found[name] = (looped or found[name][0], times + found[name][1])
        for line in computations[name]:
            for how, names in _CALLED.findall(line):
                loop = how == "body"
                again = times * (_trips(line, computations) if loop else 1)
                for called in re.findall(r"[^\s,%{}]+", names):
                    visit(called, looped or loop, again)

    visit("", False, 1)
    return found


def _trips(line: str, computations: Computations) -> int:
    """How often a loop runs that counts from 0 on."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([^\s,]+)", line)
    lines = computations[condition[1]] if condition else []
    counts = [count[1] for line in lines if (count := _COUNT.search(line))]
    return int(counts[0]) if len(counts) == 1 else 1


def _group(line: str) -> int:
    """Devices of each group, as one of three ways of writing them says; 1 where none does."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", line)
    if named is None:
        return 1
    sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
    return _product(sizes[axis] for axis in re.findall(r"'\w+'", named[2]))


def _product(sizes) -> int:
    return math.prod(int(size) for size in sizes if size)
