"""Reads `.bin` files written by `torch.save` without torch, and without running anything in them.

A `.bin` file is a zip archive: `<prefix>/data.pkl` describes the tensors, `<prefix>/data/<key>`
holds their bytes, uncompressed, so that they can be memory-mapped. Names are never used as paths.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from convert.files.foreign import GGML, USE_TORCH, is_ggml
from convert.files.tensor import BFLOAT16, StoredTensor, bad_file, check_shape, regular_file_size
from glm2_jax.errors import CheckpointError, shorten

MAX_PICKLE_BYTES = 4 * 2**20  # those of real files have some 50 KB
_MAX_READ = MAX_PICKLE_BYTES
_MAX_ARGUMENTS = 7  # of _rebuild_tensor_v2

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


class _Storage(NamedTuple):
    """A typed run of `numel` elements; `key` names the archive member that holds it."""

    key: str
    dtype: np.dtype
    numel: int


class _Tensor(NamedTuple):
    """A view of a storage; `offset` and `strides` count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """The pickle asks for something outside the list."""


class _Dictionary(dict):
    """A dictionary without repeated keys; hashing nested tuples could take forever.

    So could huge integers, again and again: `_OPCODES` has none beyond 255 bytes.
    """

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int):
            raise _Refused(f"has a dictionary key of type {type(key).__name__}")
        if key in self:
            raise ValueError(f"the name {key!r} appears twice")
        super().__setitem__(key, value)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Do what `torch._utils._rebuild_tensor_v2` does; further arguments do not concern weights."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor is rebuilt from something that is not a storage")
    for number in (offset, *shape, *strides):
        if type(number) is not int or not 0 <= number < 2**62:
            raise ValueError("a count is not an integer in range")
    check_shape(shape)
    count = math.prod(shape)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # The second test refuses views that repeat elements (stride 0): a small file could otherwise
    # claim any amount of memory.
    if count and (offset + last >= storage.numel or count > storage.numel):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": lambda: _Dictionary(),  # and never with items, which it hashes
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": BFLOAT16,
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.BoolStorage": np.dtype(np.bool_),
}
_OPCODES = frozenset(
    "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BININT BININT1 BININT2 LONG1 BINFLOAT "
    "EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET".split()
)
_NAMES = {ord(info.code): info.name for info in pickletools.opcodes}


class _Actions(dict):
    """Opcode -> what the unpickler does; an opcode that weights do not need is refused."""

    def __missing__(self, code: int) -> Any:
        raise _Refused(f"uses the opcode {_NAMES.get(code, code)}")


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with the names and opcodes left that weights need: nothing is imported.

    It is the one written in Python: its actions can be taken away, and its memo is a dictionary,
    where the one in C allocates whatever a memo index asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in _GLOBALS:
            raise _Refused(f"asks for {full[:200]}")
        return _GLOBALS[full]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5:
            raise _Refused("has a persistent id that is not a storage")
        kind, dtype, key, _, numel = pid  # the fourth is the device
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise _Refused("has a persistent id that is not a storage")
        if type(numel) is not int or not 0 <= numel < 2**62:
            raise ValueError("a count is not an integer in range")
        return _Storage(key, dtype, numel)

    def _new_dictionary(self: Any) -> None:
        self.append(_Dictionary())

    def _call(self: Any) -> None:
        arguments = self.stack.pop()
        # A longer tuple, unpacked for each of many calls, would take hours.
        if not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
            raise _Refused(f"calls something with more than {_MAX_ARGUMENTS} arguments")
        self.stack[-1] = self.stack[-1](*arguments)

    def _drop_state(self: Any) -> None:
        """Ignore a state: `state_dict()` keeps version numbers in an attribute `_metadata`."""
        self.stack.pop()

    dispatch = _Actions(
        {code: pickle._Unpickler.dispatch[code] for code, x in _NAMES.items() if x in _OPCODES}
    )
    dispatch[pickle.EMPTY_DICT[0]] = _new_dictionary
    dispatch[pickle.REDUCE[0]] = _call
    dispatch[pickle.BUILD[0]] = _drop_state


def read_state_dict(data: bytes, path: Path) -> dict[str, _Tensor]:
    """Return the tensors of a pickled state dictionary; everything else is a CheckpointError."""
    try:
        result = _Unpickler(io.BytesIO(data)).load()
    except _Refused as refusal:
        raise CheckpointError(
            f"{path} is refused: its pickle {refusal}.",
            "Weights need only dictionaries and tensors; such a file could run code elsewhere.",
            "Do not open it with other tools; get the weights from a source you trust.",
        ) from None
    except (
        pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, OverflowError,
        AttributeError, struct.error,
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise bad_file(path, "is damaged: its pickle cannot be followed", reason) from error
    entries = result.items() if isinstance(result, dict) else [(None, result)]
    bad = [x for x, value in entries if not (isinstance(x, str) and isinstance(value, _Tensor))]
    if not bad:
        return result
    fix = "Save it again as torch.save(model.state_dict(), FILE) does."
    # Each dictionary once, however many names it has.
    inner = {id(value): (name, value) for name, value in entries if isinstance(value, dict)}
    for name, value in inner.values():
        if any(isinstance(x, _Tensor) for x in value.values()):
            saved = f"torch.load(FILE, weights_only=True)[{shorten(name)}]"
            fix = f"Save those alone: torch.save({saved}, 'pytorch_model.bin')."
    which = f": {shorten(bad[0])} is not a tensor" if isinstance(result, dict) else ""
    raise CheckpointError(
        f"{path} does not hold a dictionary of tensors{which}.",
        "A file of weights alone is needed; this may be a training checkpoint.",
        fix,
    )


class _File(io.FileIO):
    """A file that is read in small pieces: `zipfile` would take a directory of any size at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_READ:
            raise ValueError(f"it has {size} bytes; {_MAX_READ} are the limit")
        return super().read(size)


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a `.bin` file of torch >= 1.6; their bytes stay in the file.

    What is truncated, compressed or inconsistent, or asks for anything but tensors, is a
    `CheckpointError` with the file and the reason.
    """
    size = regular_file_size(path)
    with _File(path) as file:
        _check_container(path, file.read(512), size)
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
            why = f"The directory at the end of the archive cannot be read ({str(error)[:200]})."
            what = f"is truncated or damaged: it has {size} bytes"
            raise bad_file(path, what, why) from error
        by_name = {member.filename: member for member in members}
        if len(by_name) < len(members):
            raise _invalid(path, "a member appears twice")
        roots = [name for name in by_name if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise _invalid(path, f"it holds {len(roots)} members PREFIX/data.pkl instead of one")
        prefix = roots[0].removesuffix("data.pkl")
        order = by_name.get(f"{prefix}byteorder")
        if order is not None and _read(path, file, size, order, 16).strip() != b"little":
            raise _invalid(path, "its numbers are not little-endian")
        pickled = _read(path, file, size, by_name[roots[0]], MAX_PICKLE_BYTES)
        found = {}
        for name, tensor in read_state_dict(pickled, path).items():
            dtype, member = tensor.storage.dtype, by_name.get(f"{prefix}data/{tensor.storage.key}")
            if member is None:
                raise _invalid(path, f"the storage of {name[:200]!r} is missing")
            expected = tensor.storage.numel * dtype.itemsize
            if member.file_size != expected:
                sizes = f"{member.file_size} bytes instead of {expected}"
                raise _invalid(path, f"the storage of {name[:200]!r} has {sizes}")
            start = _start_of(path, file, size, member) + tensor.offset * dtype.itemsize
            strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
            found[name] = StoredTensor(path, dtype, tensor.shape, start, strides)
        return found


def _check_container(path: Path, start: bytes, size: int) -> None:
    """Refuse what is not a zip archive, by name where it is something known."""
    if start.startswith(b"PK\x03\x04"):
        return
    if is_ggml(start):
        raise CheckpointError(f"{path} is {GGML}.", fix=USE_TORCH)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        raise CheckpointError(
            f"{path} is a safetensors file.",
            "A .bin file must be one of torch.save.",
            "Give it a name that ends in .safetensors, and name it so in its index if it has one.",
        )
    if start.startswith(b"\x80") or start[257:262] == b"ustar":
        raise CheckpointError(
            f"{path} cannot be read.",
            "It is a bare pickle or of torch < 1.6, which could run code when opened.",
            "Save it again with a recent torch: torch.save(torch.load(FILE, weights_only=True), "
            "FILE).",
        )
    raise CheckpointError(
        f"{path} is not a torch file.",
        f"It begins with {start[:8]!r} instead of a zip header." if size else "It is empty.",
        "Download it again; a web page saved under that name is a common cause.",
    )


def _invalid(path: Path, reason: str) -> CheckpointError:
    return bad_file(path, f"is not a valid torch file: {reason}")


def _start_of(path: Path, file: BinaryIO, size: int, member: zipfile.ZipInfo) -> int:
    """Return the first byte of a member, which must be stored as it is inside the file."""
    name = repr(member.filename[:100])
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        sizes = f"{member.compress_size} -> {member.file_size} bytes"
        raise _invalid(path, f"the member {name} is compressed ({sizes}), which torch never does")
    header = b""
    if 0 <= member.header_offset < size:
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise _invalid(path, f"the header of {name} is not where the directory says")
    *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if start + member.file_size > size:
        why = f"{name} ends at byte {start + member.file_size}; the file has {size} bytes."
        raise bad_file(path, "is truncated", why)
    return start


def _read(path: Path, file: BinaryIO, size: int, member: zipfile.ZipInfo, limit: int) -> bytes:
    """Return the bytes of a small member."""
    if member.file_size > limit:
        what = f"{member.filename[:100]!r} has {member.file_size} bytes; {limit} are the limit"
        raise _invalid(path, what)
    file.seek(_start_of(path, file, size, member))
    return file.read(member.file_size)
