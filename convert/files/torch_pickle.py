"""A pickle interpreter that can only build a dictionary of tensors.

Python's own unpickler imports and calls whatever the file names. This one knows a dozen names,
treats each as a word and not as an object to import, and refuses everything else by name. It
follows the opcodes as `pickletools` documents them, and rebuilds tensors as
`torch._utils._rebuild_tensor_v2` does.
"""

import dataclasses
import io
import math
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert.files.tensor import BFLOAT16, MAX_DIMENSIONS, bad_file, check_shape
from glm2_jax.errors import CheckpointError

MAX_OPCODES = 5_000_000

_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_STORAGES: dict[str, np.dtype] = {
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
_ALLOWED = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGES}


@dataclasses.dataclass(frozen=True)
class Name:
    """An allowed global: only its name, never the object."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A typed run of `numel` elements; `key` names the archive member that holds it."""

    key: str
    dtype: np.dtype
    numel: int


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A view of a storage; `offset` and `strides` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether the elements are in row-major order without gaps."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


def read_state_dict(data: bytes, path: Path) -> dict[str, TorchTensor]:
    """Return the tensors of a pickled state dictionary.

    Args:
        data: the pickle.
        path: the file it came from, for messages.

    Returns:
        name -> tensor.

    Raises:
        CheckpointError: the pickle names or does anything that tensors do not need, or is damaged.
    """
    try:
        result = _Machine().run(data)
    except _Refused as refusal:
        raise CheckpointError(
            f"{path} is refused: its pickle {refusal}.",
            "Weights need only dictionaries and tensors; such a file could run code elsewhere.",
            "Do not open it with other tools; get the weights from a source you trust.",
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise bad_file(path, "is damaged: its pickle cannot be followed", reason) from error
    save = "Save it again as torch.save(model.state_dict(), FILE) does."
    if not isinstance(result, dict):
        raise CheckpointError(
            f"{path} does not hold a dictionary of tensors.",
            f"It holds a {type(result).__name__}, so that no tensor has a name.",
            save,
        )
    for name, value in result.items():
        if isinstance(value, dict) and any(isinstance(x, TorchTensor) for x in value.values()):
            saved = f"torch.load(FILE, weights_only=True)[{str(name)[:200]!r}]"
            save = f"Save those alone: torch.save({saved}, 'pytorch_model.bin')."
    for name, value in result.items():
        if not isinstance(name, str) or not isinstance(value, TorchTensor):
            shown = name[:200] if isinstance(name, str) else type(name).__name__
            raise CheckpointError(
                f"{path}: the entry {shown!r} is not a tensor.",
                "A file of weights alone is needed; this may be a training checkpoint.",
                save,
            )
    return result


class _Refused(Exception):
    """The pickle asks for something outside the list."""


class _Machine:
    """The stack, the marks and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        file = io.BytesIO(data)
        for _ in range(MAX_OPCODES):
            opcode = _OPCODES.get(file.read(1))
            if opcode is None:
                raise ValueError("the pickle is truncated, or has an unknown instruction")
            if opcode.name == "STOP":
                return self.pop()
            action = _ACTIONS.get(opcode.name)
            if action is None:  # before anything of its argument is read
                raise _Refused(f"uses the opcode {opcode.name}")
            if opcode.name == "GLOBAL":
                argument = _read_global(file)
            else:
                argument = opcode.arg.reader(file) if opcode.arg else None
            action(self, argument)
        raise _Refused(f"has more than {MAX_OPCODES} opcodes")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError("a value is taken from below a mark")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_many(self, length: int) -> list[Any]:
        return [self.pop() for _ in range(length)][::-1]

    def remember(self, slot: int) -> None:
        self.memo[slot] = self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise _Refused(f"sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise _Refused(f"has a dictionary key of type {type(key).__name__}")
            if key in target:
                raise ValueError(f"the name {str(key)[:200]!r} appears twice")
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise _Refused(f"appends to a {type(target).__name__}")
        target.extend(values)

    def push_name(self, name: str) -> None:
        if name not in _ALLOWED:
            raise _Refused(f"asks for {name[:200]}")
        self.push(Name(name))

    def stack_global(self) -> None:
        module, name = self.pop_many(2)
        if not isinstance(name, str) or not isinstance(module, str):
            raise _Refused("asks for a global whose name is not text")
        self.push_name(f"{module}.{name}")

    def build(self) -> None:
        """Drop a state: `state_dict()` keeps version numbers in an attribute `_metadata`."""
        state = self.pop()
        if not isinstance(self.stack[-1], dict) or not isinstance(state, dict):
            raise _Refused("sets the state of something that is not a dictionary")

    def persistent(self) -> None:
        reference = self.pop()
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise _Refused("has a persistent id that is not a storage")
        _, kind, key, _, numel = reference
        if not isinstance(kind, Name) or kind.name not in _STORAGES or not isinstance(key, str):
            raise _Refused("has a storage of an unknown type")
        self.push(Storage(key, _STORAGES[kind.name], _count(numel)))

    def reduce(self) -> None:
        function, arguments = self.pop_many(2)
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise _Refused("calls something that is not a name")
        if function.name == _ORDERED_DICT and not arguments:
            self.push({})
        elif function.name == _REBUILD_TENSOR:
            self.push(_tensor(arguments))
        elif function.name == _REBUILD_PARAMETER and isinstance(arguments[0], TorchTensor):
            self.push(arguments[0])
        else:
            raise _Refused(f"calls {function.name} in a way that weights never need")


def _read_global(file: io.BytesIO) -> str:
    """Read "module.name" of two lines; `pickletools` would take backslashes for escapes."""
    module, name = file.readline(), file.readline()
    if not name.endswith(b"\n"):
        raise ValueError("the name of a global has no end")
    return f"{module[:-1].decode()}.{name[:-1].decode()}"


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError("a count is not an integer in range")
    return value


def _tensor(arguments: tuple) -> TorchTensor:
    """Rebuild (storage, offset, size, stride, requires_grad, backward_hooks[, metadata])."""
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage):
        raise _Refused("rebuilds a tensor from something that is not a storage")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise _Refused("rebuilds a tensor whose shape is not a tuple")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("shape and strides of a tensor do not fit each other")
    shape, strides = tuple(map(_count, shape)), tuple(map(_count, strides))
    count = math.prod(shape)
    if count == 0:
        check_shape(shape)
    else:
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        # The second test refuses views that repeat elements (stride 0): a small file could
        # otherwise claim any amount of memory.
        if _count(offset) + last >= storage.numel or count > storage.numel:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
    return TorchTensor(storage, _count(offset), shape, strides)


_OPCODES = {info.code.encode("latin-1"): info for info in pickletools.opcodes}
# Opcodes whose argument is the value: text, integers, floats.
_VALUES = (
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2",
    "LONG1", "LONG4", "BINFLOAT",
)  # fmt: skip
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    **dict.fromkeys(_VALUES, _Machine.push),
    "NONE": _Machine.push,  # an opcode without an argument: None
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop_many(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop_many(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop_many(3))),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop_many(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "APPEND": lambda machine, _: machine.extend(machine.pop_many(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, x: machine.push(machine.memo[x])),
    "GLOBAL": _Machine.push_name,
    "STACK_GLOBAL": lambda machine, _: machine.stack_global(),
    "BINPERSID": lambda machine, _: machine.persistent(),
    "BUILD": lambda machine, _: machine.build(),
    "REDUCE": lambda machine, _: machine.reduce(),
}
