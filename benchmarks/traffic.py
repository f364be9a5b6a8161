"""Counts the bytes that a compiled program reads from memory and writes to it, from its text.

An instruction reads its operands and writes its result; what is fused stays on the chip. Counted
is what is touched: the slice that is sliced out of an operand, the update that is written into a
buffer in place, a loop's body as often as it runs, and of branches the one that moves most. An
operand counts once for an instruction that reads it several times. What XLA:TPU keeps in memory on
the chip is no traffic.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAMED = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16,
    "f64": 64, "s64": 64, "u64": 64, "token": 0,
}  # fmt: skip
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier",
    "optimization-barrier", "partition-id", "replica-id", "add-dependency",
}  # fmt: skip
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written
_VIEWS = {"bitcast", "convert", "copy", "reshape", "transpose"}


class Array(NamedTuple):
    """The type of a value, or of a part of a tuple."""

    elements: int
    bits: int  # of an element
    slow: bool  # whether it is in the device's memory, not on the chip

    @property
    def bytes(self) -> float:
        return self.elements * self.bits / 8 if self.slow else 0


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    results: list[Array]
    opcode: str
    operands: list[str]
    rest: str  # its attributes
    root: bool


class Moved(NamedTuple):
    """The bytes of an instruction, all its runs together."""

    name: str
    opcode: str
    read: float
    written: float
    times: int
    line: str  # its attributes, which say where it comes from

    @property
    def bytes(self) -> float:
        return self.read + self.written


def traffic(text: str) -> list[Moved]:
    """Return what each instruction of an optimized program moves, as `Compiled.as_text` has it."""
    return _Program(text).moved("", 1)


class _Program:
    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {"": {}}
        where = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                where = "" if header[1] else header[2]
                self.computations[where] = {}
            elif found := _NAMED.match(line):
                one = _instruction(found[2], found[3], bool(found[1]))
                self.computations[where][one.name] = one

    def moved(self, where: str, times: int) -> list[Moved]:
        """Return what a computation moves that runs so often."""
        found = []
        for one in self.computations[where].values():
            if one.opcode == "while":
                body = _called(one, "body")[0]
                found += self.moved(body, times * self._trips(one))
            elif one.opcode == "conditional":
                branches = _called(one, "branch_computations|true_computation|false_computation")
                taken = [self.moved(branch, times) for branch in branches]
                found += max(taken, key=lambda all_: sum(part.bytes for part in all_))
            elif one.opcode == "call":
                found += self.moved(_called(one, "to_apply|calls")[0], times)
            elif one.opcode not in _FREE and not one.opcode.endswith("-start"):
                read, written = self._bytes(where, one)
                found.append(
                    Moved(one.name, one.opcode, read * times, written * times, times, one.rest)
                )
        return found

    def _bytes(self, where: str, one: Instruction) -> tuple[float, float]:
        """Return what one run of an instruction reads and writes."""
        known = self.computations[where]
        operands = [known[name].results for name in one.operands if name in known]
        results = one.results
        if one.opcode.endswith("-done"):  # of a copy that runs meanwhile
            start = known[one.operands[0]]
            source = known[start.operands[0]].results[0] if start.operands else results[0]
            size = results[0].elements * results[0].bits / 8
            return size * source.slow, size * results[0].slow
        if one.opcode in _SLICES:
            touched = results[0].elements * operands[0][0].bits / 8 * operands[0][0].slow
            return touched + _total(operands[1:]), _total([results])
        if one.opcode in _UPDATES:
            update = operands[_UPDATES[one.opcode]][0]
            return _total(operands[1:]), update.elements * results[0].bits / 8 * results[0].slow
        if one.opcode == "fusion":
            return self._fused(one, operands)
        if "__cublas" in one.rest:  # its last result is room to work in
            results = results[:1]
        return _total(operands), _total([results])

    def _fused(self, one: Instruction, operands: list[list[Array]]) -> tuple[float, float]:
        inside = _called(one, "calls")[0]
        parameters = self._parameters(inside)
        read = 0.0
        for number, arrays in enumerate(operands):
            if len(arrays) > 1:
                read += _total([arrays])
            else:
                read += self._read(inside, parameters[number]) * arrays[0].bits / 8 * arrays[0].slow
        sizes = self._written(inside, next(i for i in self.computations[inside].values() if i.root))
        written = sum(
            size * array.bits / 8 * array.slow
            for size, array in zip(sizes, one.results, strict=True)
        )
        return read, written

    def _parameters(self, where: str) -> dict[int, str]:
        """Return the names of a computation's parameters by their number."""
        return {
            int(one.rest.split(")")[0]): one.name
            for one in self.computations[where].values()
            if one.opcode == "parameter"
        }

    def _read(self, where: str, name: str) -> int:
        """Return how many elements of a value a fused computation reads."""
        total, known = 0, self.computations[where]
        complete = known[name].results[0].elements
        for user in known.values():
            if name not in user.operands:
                continue
            first = user.operands[0] == name and name not in user.operands[1:]
            if user.opcode in _SLICES and first:
                total += user.results[0].elements
            elif user.opcode in _UPDATES and first:
                continue
            elif user.opcode in _VIEWS and not user.root:
                total += self._read(where, user.name)
            elif user.opcode == "fusion":
                inside = _called(user, "calls")[0]
                for number, operand in enumerate(user.operands):
                    parameter = self._parameters(inside)[number]
                    if operand == name and self._returns(inside, parameter):
                        total += self._read(where, user.name)
                    elif operand == name:
                        total += self._read(inside, parameter)
            else:
                return complete
        return min(total, complete)

    def _written(self, where: str, one: Instruction) -> list[int]:
        """Return how many elements of each result a fused computation writes."""
        known = self.computations[where]
        if one.opcode == "tuple":
            return [self._written(where, known[name])[0] for name in one.operands]
        if one.opcode == "fusion":
            inside = self.computations[_called(one, "calls")[0]]
            root = next(part for part in inside.values() if part.root)
            return self._written(_called(one, "calls")[0], root)
        if one.opcode == "bitcast":
            return self._written(where, known[one.operands[0]])
        if one.opcode in _UPDATES and self._is_parameter(where, one.operands[0]):
            return [known[one.operands[_UPDATES[one.opcode]]].results[0].elements]
        return [array.elements for array in one.results]

    def _returns(self, where: str, parameter: str) -> bool:
        """Return whether a computation returns a view of a parameter."""
        one = next(part for part in self.computations[where].values() if part.root)
        while one.opcode in _VIEWS:
            one = self.computations[where][one.operands[0]]
        return one.name == parameter

    def _is_parameter(self, where: str, name: str) -> bool:
        one = self.computations[where][name]
        while one.opcode == "bitcast":
            one = self.computations[where][one.operands[0]]
        return one.opcode == "parameter"

    def _trips(self, one: Instruction) -> int:
        """Return how often a loop runs."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', one.rest):
            return int(known[1])
        condition = self.computations[_called(one, "condition")[0]].values()
        counts = [part.rest for part in condition if part.opcode == "constant"]
        if len(counts) != 1:
            raise ValueError(f"the text does not say how often the loop {one.name} runs")
        return int(counts[0].split(")")[0])


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    opcode = text[: text.index("(")]
    end = _closing(text, len(opcode))
    inside = text[len(opcode) + 1 : end - 1]
    rest = text[end:] if opcode not in ("parameter", "constant") else inside + ")" + text[end:]
    arrays = [_array(*found) for found in _ARRAY.findall(kind)]
    return Instruction(name, arrays, opcode, re.findall(r"%([\w.\-]+)", inside), rest, root)


def _closing(text: str, start: int) -> int:
    """Return the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    raise ValueError(f"not closed: {text[start : start + 80]}")


def _array(kind: str, sizes: str, layout: str) -> Array:
    elements = math.prod(int(size) for size in sizes.split(",") if size)
    return Array(elements, _BITS.get(kind, 32), not re.search(r"S\([1-9]", layout))


def _called(one: Instruction, attribute: str) -> list[str]:
    names = []
    for listed in re.findall(rf"(?:{attribute})=(\{{[^}}]*\}}|[^\s,]+)", one.rest):
        names += re.findall(r"[^\s,%{}]+", listed)
    return names


def _total(values: list[list[Array]]) -> float:
    return sum(array.bytes for arrays in values for array in arrays)
