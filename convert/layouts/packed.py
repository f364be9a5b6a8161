"""Reads the matrices of AWQ and GPTQ folders, each packed in three or four tensors.

A matrix has `qweight`, its unsigned integers, and for every group of consecutive columns `scales`
and `qzeros`: W = scale * (integer - zero). An int32 holds 32 / bits integers, the first in its
lowest bits, with these shapes for R rows, C columns and G groups:

* AWQ (AutoAWQ, version "gemm"): `qweight` [C, R / 8] and `qzeros` [G, R / 8]; an int32 holds the
  rows 0, 2, 4, 6, 1, 3, 5, 7 of eight.
* GPTQ (AutoGPTQ, GPTQModel): `qweight` [C * bits / 32, R] and `qzeros` [G, R * bits / 32], where
  the checkpoint format "gptq" holds every zero point minus 1 (0 as the largest integer), and
  "gptq_v2" as it is; and `g_idx` [C], the group of every column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.files.aliases import plain_name
from convert.files.foreign import ORIGINALS, unknown_quantization
from convert.files.shards import read_json
from convert.files.tensor import StoredTensor
from convert.layouts.names import FLOATS, SCALE
from glm2_jax.errors import CheckpointError, shorten
from glm2_jax.schemes import SCHEMES, Scheme

# Where the method is described if config.json does not: a file, and the method without a name.
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_ZERO_OFFSETS = {("awq", "gemm"): 0, ("gptq", "gptq"): 1, ("gptq", "gptq_v2"): 0}
_BITS = {"awq": (4,), "gptq": (4, 8)}
_ROWS = np.array((0, 4, 1, 5, 2, 6, 3, 7))  # where an int32 of AWQ holds each of its eight rows
_BLOCK = 2**20  # elements that are unpacked at once
_WORD = 32


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the matrices of a folder are packed."""

    method: str  # "awq" or "gptq"
    bits: int
    group: int | None  # columns of a group; None = all of a row
    symmetric: bool  # whether every zero point is the middle of the integers
    offset: int  # what is added to a stored zero point

    @property
    def scheme(self) -> Scheme | None:
        """The scheme that has the same values; None = none has.

        Integers minus their zero points need a bit more than the integers, except if those are
        symmetric.
        """
        if self.bits == 8 and not self.symmetric:
            return None
        bits = 4 if self.bits == 4 and self.symmetric else 8
        if self.group is None:
            return SCHEMES["int4-row" if bits == 4 else "int8"]
        return next(
            (x for x in SCHEMES.values() if x.grouped and (x.bits, x.most) == (bits, self.group)),
            None,
        )

    @property
    def text(self) -> str:
        """What a message calls it."""
        groups = "a row" if self.group is None else f"{self.group} columns"
        return f"{self.method.upper()} of {self.bits} bits, a scale for {groups}"


def read_packing(folder: Path, raw: Mapping[str, Any]) -> Packing | None:
    """Return how a folder's matrices are packed by what its configuration says, None if they are
    not; CheckpointError: in a way that is not supported."""
    where, method = "config.json: quantization_config", None
    found: Any
    if not (found := raw.get("quantization_config")):
        where = next((name for name in _FILES if (folder / name).is_file()), "")
        if not where:
            return None
        found, method = read_json(folder / where), _FILES[where]
    if isinstance(found, Mapping):
        method = found.get("quant_method", method)
    if not isinstance(method, str) or method not in _BITS:
        raise unknown_quantization(found, where)
    form = found.get("checkpoint_format") or found.get("format")
    if method == "awq":
        form = found.get("version") or form or "gemm"
    form = "marlin" if found.get("is_marlin_format") else form or "gptq"
    bits: Any = found.get("bits", found.get("w_bit"))
    group = found.get("group_size", found.get("q_group_size", -1))
    offset = _ZERO_OFFSETS.get((method, str(form).lower()))
    good = type(group) is int and (group == -1 or group > 0)
    for name, value, known in (
        ("format", form, offset is not None),
        ("bits", bits, type(bits) is int and bits in _BITS[method]),
        ("group_size", group, good),
    ):
        if not known:
            raise CheckpointError(
                f"{where}: {method} with {name} = {shorten(value)} is not supported.",
                "AWQ is read in 4 bits and the format gemm, GPTQ in 4 or 8 bits and the formats "
                "gptq and gptq_v2.",
                ORIGINALS,
            )
    assert offset is not None
    symmetric = method == "gptq" and found.get("sym") is True
    return Packing(method, bits, None if group == -1 else group, symmetric, offset)


@dataclasses.dataclass(frozen=True)
class _Unpacked(StoredTensor):
    """A tensor that is computed whenever it is read."""

    compute: Callable[[], np.ndarray] = dataclasses.field(kw_only=True)

    def read(self) -> np.ndarray:
        """Return the array, in memory of its own."""
        return self.compute()


def unpack(
    packing: Packing,
    tensors: Mapping[str, StoredTensor],
    covered: Collection[str],
    others: Collection[str],
) -> tuple[dict[str, StoredTensor], Scheme | None, tuple[str, ...]]:
    """Return the tensors of a folder with matrices and scales of a scheme in place of packed ones,
    the scheme, and a line for the user if the values are not held as they are stored.

    Matrices are floats, of the type of the scales, and the scheme is None, where no scheme has
    their values. `covered` are the names of the matrices of the layers, `others` those of the other
    tensors. CheckpointError: nothing is packed, or packed tensors are missing or do not fit.
    """
    matrices = {
        name.removesuffix(".qweight"): _Matrix(name.removesuffix(".qweight"), packing, tensors)
        for name in tensors
        if name.endswith(".qweight")
    }
    if not matrices:
        raise CheckpointError(
            f"The weights are not packed as {packing.method.upper()} packs them.",
            "The configuration says so (quantization_config, or quantize_config.json), but no "
            "tensor is named .qweight.",
            "Use the configuration of these weights.",
        )
    known = set(map(plain_name, others))
    obstacle = _obstacle(packing, list(matrices.values()), covered)
    scheme = None if obstacle else packing.scheme
    result: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".")
        if base not in matrices or kind not in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            result[name] = tensor
        elif kind == "qweight":
            result |= matrices[base].tensors(scheme)
        elif kind == "bias" and (plain_name(name) in known or tensor.read().any()):
            result[name] = tensor  # AutoGPTQ wrote zeros where a product has no bias
    notes = [f"the weights are dequantized: {obstacle} no integer form here"] * (scheme is None)
    if scheme is not None and scheme.bits > packing.bits:
        notes.append("the integers minus their zero points take 8 bits, not 4; no value changes")
    return result, scheme, tuple(notes)


def _obstacle(
    packing: Packing, matrices: Sequence[_Matrix], covered: Collection[str]
) -> str | None:
    """Return what no scheme can hold, None where one can; `covered` as in `unpack`."""
    scheme = packing.scheme
    if packing.bits == 8 and not packing.symmetric:
        return "integers of 8 bits minus a zero point have"
    if scheme is None or any(scheme.group(m.columns) not in (None, m.group) for m in matrices):
        return f"groups of {packing.group} columns have"
    if {plain_name(f"{m.name}.weight") for m in matrices} != set(map(plain_name, covered)):
        return "a model of which only some of the layers' matrices are packed, or others, has"
    if not all(m.consecutive for m in matrices):
        return "groups whose columns do not follow each other (desc_act) have"
    return None


class _Matrix:
    """The packed tensors of one matrix, of which any block of rows can be unpacked."""

    def __init__(self, name: str, packing: Packing, tensors: Mapping[str, StoredTensor]):
        self.name, self.packing = name, packing
        kinds = ("qweight", "qzeros", "scales")
        missing = [kind for kind in kinds if f"{name}.{kind}" not in tensors]
        if missing:
            raise CheckpointError(
                f"{name}.{' and .'.join(missing)} of a packed matrix is missing.",
                "A matrix has integers, zero points and scales.",
                "Download the weights again, with all shards.",
            )
        self.qweight, self.qzeros, self.scales = (tensors[f"{name}.{kind}"] for kind in kinds)
        self.order = tensors.get(f"{name}.g_idx") if packing.method == "gptq" else None
        each = _WORD // packing.bits  # integers of an int32
        long, wide = (*self.qweight.shape, 1, 1)[:2]
        gptq = packing.method == "gptq"
        self.rows, self.columns = (wide, long * each) if gptq else (wide * each, long)
        self.group = min(packing.group or self.columns, self.columns)
        groups = -(-self.columns // max(self.group, 1))
        for tensor, shape, types in (
            (self.qweight, (long, wide), ("int32",)),
            (self.qzeros, (groups, -(-self.rows // each)), ("int32",)),
            (self.scales, (groups, self.rows), FLOATS),
            (self.order, (self.columns,), ("int32", "int64")),
        ):
            if tensor is not None and (tensor.shape != shape or tensor.dtype.name not in types):
                kind = next(key for key, x in tensors.items() if x is tensor)
                raise CheckpointError(
                    f"{kind} is {tensor.dtype.name} {tensor.shape}, expected {types[0]} {shape}.",
                    f"{name} is packed as {packing.text}.",
                    "Use the configuration of these weights, or download them again.",
                )

    @property
    def consecutive(self) -> bool:
        """Whether the columns of a group follow each other."""
        if self.order is None:
            return True
        return np.array_equal(self._groups(), np.arange(self.columns) // self.group)

    def tensors(self, scheme: Scheme | None) -> dict[str, StoredTensor]:
        """Return the matrix [R, C] and its scales as a folder of a scheme names and shapes them, or
        for None the dequantized matrix."""
        name, scales, shape = f"{self.name}.weight", self.scales, (self.rows, self.columns)

        def tensor(like: StoredTensor, shape: Any, dtype: Any, compute: Any) -> StoredTensor:
            return _Unpacked(like.file, np.dtype(dtype), shape, like.offset, compute=compute)

        if scheme is None:
            compute = partial(self._in_blocks, shape, scales.dtype, self._floats)
            return {name: tensor(self.qweight, shape, scales.dtype, compute)}
        values, groups = scheme.shapes(shape, 1)
        block = self._packed if scheme.bits == 4 else self._integers
        compute = partial(self._in_blocks, values, np.int8, block)
        return {
            name: tensor(self.qweight, values, np.int8, compute),
            name + SCALE: tensor(
                scales, groups, scales.dtype, lambda: scales.read().T.reshape(groups)
            ),
        }

    def _in_blocks(self, shape: tuple[int, ...], dtype: Any, compute: Any) -> np.ndarray:
        result, each = np.empty(shape, dtype), _WORD // self.packing.bits
        step = max(_BLOCK // max(self.columns, 1) // each, 1) * each
        for start in range(0, self.rows, step):
            rows = slice(start, min(start + step, self.rows))
            result[rows] = compute(rows)
        return result

    def _packed(self, rows: slice) -> np.ndarray:
        from glm2_jax.quant import pack_int4  # imports jax

        return pack_int4(self._integers(rows).astype(np.int8))

    def _floats(self, rows: slice) -> np.ndarray:
        scales = self.scales.read()[:, rows].T.astype(np.float32)
        return scales[:, self._groups()] * self._integers(rows)

    def _integers(self, rows: slice) -> np.ndarray:
        """Return int16 [rows, C], the zero points subtracted."""
        bits, each = self.packing.bits, _WORD // self.packing.bits
        words = slice(rows.start // each, -(-rows.stop // each))
        packed, zeros = self.qweight.read(), self.qzeros.read()[:, words]
        if self.packing.method == "gptq":
            integers, zeros = _fields(packed[:, rows].T, bits), _fields(zeros, bits)
        else:
            integers, zeros = _by_row(packed[:, words]).T, _by_row(zeros)
        zeros = (zeros.T[: len(integers)] + self.packing.offset) & (2**bits - 1)
        if self.packing.symmetric and (zeros != 2 ** (bits - 1)).any():
            bad = zeros[zeros != 2 ** (bits - 1)][0]
            raise CheckpointError(
                f"{self.name}.qzeros holds the zero point {bad}.",
                f'The configuration says "sym": true, where all are {2 ** (bits - 1)}.',
                'Set "sym": false there if the weights were quantized so.',
            )
        return integers - zeros[:, self._groups()]

    def _groups(self) -> np.ndarray:
        """Return the group of every column, int [C]."""
        if self.order is None:
            return np.arange(self.columns) // self.group
        found = self.order.read()
        if found.size and not 0 <= found.min() <= found.max() < self.scales.shape[0]:
            raise CheckpointError(
                f"{self.name}.g_idx names groups from {found.min()} to {found.max()}.",
                f"The matrix has {self.scales.shape[0]}, counted from 0.",
                "Download the weights again.",
            )
        return found


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the integers of int32 [..., n], the lowest bits first, as int16 [..., 32 / bits n]."""
    found = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        found = np.stack([found & 15, found >> 4], axis=-1).reshape(*words.shape[:-1], -1)
    return found.astype(np.int16)


def _by_row(words: np.ndarray) -> np.ndarray:
    """Return those of AWQ, int16 [..., 8 n], in the order of the rows."""
    found = _fields(words, 4)
    return found.reshape(*words.shape, 8)[..., _ROWS].reshape(found.shape)
