"""A pickle read by a machine that knows thirty instructions and calls nothing: tensors become descriptions of
themselves.

PyTorch keeps the structure of a checkpoint in a pickle, which for the usual unpickler is a program. This one
carries out only what a state dict needs; whatever else a pickle names (a global, an instruction, a key that
is no text or number) is refused by name, before anything was built from it. `pickletools` cuts the bytes into
instructions, and runs none of them.
"""

import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mplug2.errors import CheckpointError

STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


@dataclass(frozen=True)
class Global:
    """A name that a pickle asks for; it stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    """`count` numbers of a type, in the archive's entry `key`."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class Tensor:
    """A window on a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(eq=False)
class Scripted:
    """A module of a TorchScript archive (as OpenAI's CLIP is one): its attributes, without its code."""

    attributes: dict[str, Any] = field(default_factory=dict)


class Mark:
    """Where a list of things on the stack begins."""


MARK = Mark()

LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
NOTHING = {"PROTO", "FRAME", "STOP"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def unpickle(data: bytes) -> Any:
    """What a pickle describes: texts, numbers, tuples, lists, dicts, and the classes above. Raises
    CheckpointError."""
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of a stranger's odd escapes: the names they make are refused anyway
            for code, argument, _ in pickletools.genops(data):
                machine.run(code.name, argument)
        (result,) = machine.stack
    except CheckpointError:
        raise
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        AttributeError,
        AssertionError,
    ) as error:
        raise CheckpointError(f"its pickle is broken ({type(error).__name__}: {error})") from None
    return result


class _Machine:
    """The stack and the memo of a pickle's instructions."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in TUPLES:
            self.stack[-TUPLES[name] :] = [tuple(self.stack[-TUPLES[name] :])]
        elif (handler := _INSTRUCTIONS.get(name)) is not None:
            handler(self, argument)
        elif name not in NOTHING:
            raise CheckpointError(f"its pickle uses the instruction {name}, which no state dict needs")

    def since_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not MARK:
            place -= 1
            if place < 0:
                raise ValueError("a mark is missing")
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def put(self, number: int | None) -> None:
        self.memo[len(self.memo) if number is None else number] = self.stack[-1]

    def fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("pairs are put into something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise CheckpointError(f"its pickle has a dict with a key of type {type(key).__name__}")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("items are appended to something else than a list")
        target.extend(items)

    def find(self, module: Any, name: Any) -> None:
        wanted = Global(str(module), str(name))
        scripted = wanted.module.startswith("__torch__")
        storage = wanted.module in ("torch", "torch.storage") and wanted.name in STORAGES
        if not (scripted or storage or str(wanted) in _CALLS):
            raise CheckpointError(
                f"its pickle asks for {wanted}: only tensors are rebuilt, nothing else is called. Of a file "
                f"that you trust, torch can save the state dict alone"
            )
        self.stack.append(wanted)

    def call(self, _: Any) -> None:
        arguments, wanted = self.stack.pop(), self.stack.pop()
        if not isinstance(wanted, Global) or not isinstance(arguments, tuple) or str(wanted) not in _CALLS:
            raise CheckpointError(f"its pickle calls {_named(wanted)}, none of {sorted(_CALLS)}")
        self.stack.append(_CALLS[str(wanted)](*arguments))

    def create(self, _: Any) -> None:
        _, wanted = self.stack.pop(), self.stack.pop()
        if not isinstance(wanted, Global) or not wanted.module.startswith("__torch__"):
            raise CheckpointError(f"its pickle makes an object of {_named(wanted)}")
        self.stack.append(Scripted())

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Scripted) and isinstance(state, dict):
            target.attributes.update(state)
        elif not (
            type(target) is dict and isinstance(state, dict)
        ):  # a state dict's `_metadata` says nothing
            raise CheckpointError(f"its pickle sets the state of a {type(target).__name__}")

    def storage(self, _: Any) -> None:
        kind, dtype, key, _, count = self.stack.pop()
        if (
            kind != "storage"
            or not isinstance(dtype, Global)
            or dtype.name not in STORAGES
            or type(count) is not int
        ):
            raise ValueError("an outside reference is no storage")
        self.stack.append(Storage(STORAGES[dtype.name], str(key), count))


def _named(wanted: Any) -> str:
    return str(wanted) if isinstance(wanted, Global) else f"a {type(wanted).__name__}"


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > 32:
        raise ValueError("a tensor is not described by a storage, a shape and strides")
    if any(type(number) is not int or not 0 <= number < 2**48 for number in numbers):
        raise CheckpointError(f"a tensor has offset {offset}, shape {shape}, strides {strides}")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter is no tensor")
    return tensor


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    if not all(isinstance(pair, list | tuple) and isinstance(pair[0], str | int) for pair in pairs):
        raise CheckpointError("its pickle has an ordered dict with a key that is no text or number")
    return dict(pairs)


# What may be called, by full name, and what stands in for it.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.jit._pickle.build_intlist": lambda items: list(items),
    "torch.jit._pickle.build_tensorlist": lambda items: list(items),
    "torch.jit._pickle.restore_type_tag": lambda value, _: value,
}

_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda machine, _: machine.stack.append(MARK),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.fill([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.fill(machine.since_mark()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "BINGET": lambda machine, number: machine.stack.append(machine.memo[number]),
    "LONG_BINGET": lambda machine, number: machine.stack.append(machine.memo[number]),
    "GLOBAL": lambda machine, names: machine.find(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.find(machine.stack.pop(-2), machine.stack.pop()),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.create,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
