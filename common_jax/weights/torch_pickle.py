"""An interpreter for PyTorch's pickles that imports and runs nothing that they name.

A pickle is a program for a stack machine. Here its opcodes only push constants, fill containers and
describe tensors; everything else becomes an `Opaque` object without behaviour. Time and memory are
linear in the length of the pickle: no value is compared, hashed, copied or printed as a whole.
"""

import dataclasses
import pickle
import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from common_jax.untrusted import MOST_AXES, RefusedError, brief, plain

STORAGES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
    "UntypedStorage": "uint8",
}
DTYPES = (
    *sorted({*STORAGES.values()}),
    *("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"),
)
EXPORT = "torch.save(model.state_dict(), NEW_FILE)"
LARGEST = 512  # bits of an integer; PyTorch's own have 64, and numpy's generators 128
# Exceptions of this module for damaged pickles.
DAMAGED = (pickle.UnpicklingError, ArithmeticError, LookupError, TypeError, ValueError)
# Code that no weights need. It would not be run, but a file that names it is malicious, and the
# user should know.
HARMFUL_MODULES = (
    *("os", "posix", "nt", "subprocess", "pty", "socket", "shutil", "sys", "runpy", "importlib"),
    *("ctypes", "webbrowser", "pip", "timeit", "code", "codeop", "bdb", "pdb", "pickle", "_pickle"),
)
HARMFUL_BUILTINS = ("eval", "exec", "compile", "open", "__import__", "breakpoint", "execfile")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """Placeholder for an object of another class or function, with its name."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Storage:
    """A flat array of numbers in a file of the archive."""

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Tensor:
    """A view of a storage, with offset and strides in units of `dtype`. Only the number of axes is
    checked here: offset, shape and strides may contain anything."""

    storage: Storage
    dtype: str
    offset: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Scripted:
    """A module of a TorchScript archive, and its attributes."""

    name: str
    attributes: dict[Any, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _ScriptedClass:
    name: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Function:
    """A function of ours that a pickle may call, with the least and most arguments."""

    call: Callable[..., Any]
    least: int
    most: int


def load(content: bytes, *, script: bool) -> Any:
    """The value of a pickle: numbers, strings, lists, tuples and dictionaries with `Tensor`,
    `Opaque` and, if `script`, `Scripted` objects.

    Keys of dictionaries other than numbers and strings are replaced by `Opaque` objects.

    Raises:
      RefusedError: for a pickle that is damaged, or that names harmful code.
    """
    machine = _Machine(script=script, length=len(content))
    try:
        # genops decodes opcodes and arguments, and executes nothing.
        for opcode, argument, _ in pickletools.genops(content):
            _OPCODES[opcode.name](machine, argument)
        return machine.stack.pop()
    except RefusedError:
        raise
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {plain(str(error))}"
    raise RefusedError(f"has a damaged data.pkl ({reason}); copy or download it again")


# `grad` and `hooks` concern autograd only, and are ignored.
def _rebuild(storage, offset, shape, strides, grad=None, hooks=None, metadata=None, dtype=None):
    for kind in (storage, dtype):
        if isinstance(kind, Opaque):  # a dtype that is not supported
            return kind
    if not isinstance(storage, Storage):
        raise RefusedError("holds a tensor without a storage")
    if metadata:
        raise RefusedError(
            f"holds a tensor that is more than its numbers: {brief(metadata)}; with PyTorch: "
            f"{EXPORT}"
        )
    if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):
        raise RefusedError(f"holds a tensor of type {brief(dtype)}")
    return Tensor(storage, dtype or storage.dtype, offset, _axes(shape), _axes(strides))


def _rebuild_untyped(storage, offset, shape, strides, grad, hooks, dtype, metadata=None):
    return _rebuild(storage, offset, shape, strides, grad, hooks, metadata, dtype)


def _axes(sizes: Any) -> tuple[Any, ...]:
    if not isinstance(sizes, list | tuple) or len(sizes) > MOST_AXES:
        raise RefusedError(
            f"holds a tensor whose shape or strides are no list of sizes: {brief(sizes)}"
        )
    return tuple(sizes)


def _first(value, *others):
    return value


_PARAMETER = _Function(_first, 1, 4)
_ORDERED_DICT = Opaque("collections.OrderedDict")  # a call of it returns a dict
# Functions and types for tensors and for the plain contents of optimizers and scalers.
KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ORDERED_DICT,
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild, 4, 4),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild, 6, 7),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_rebuild_untyped, 7, 8),
    ("torch._utils", "_rebuild_parameter"): _PARAMETER,
    ("torch._utils", "_rebuild_parameter_with_state"): _PARAMETER,
    ("torch", "Size"): _Function(_axes, 1, 1),
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{("torch.storage", name): dtype for name, dtype in STORAGES.items()},
    **{("torch", dtype): dtype for dtype in DTYPES},
}
# The same for attributes of TorchScript modules that are lists.
KNOWN_IN_SCRIPT = {
    ("torch.jit._pickle", name): _Function(_first, 1, 2)
    for name in (
        *("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist"),
        "restore_type_tag",
    )
}


class _Machine:
    """The stack and memo of a pickle, and the operations of its opcodes.

    Args:
      script: whether the pickle is of a TorchScript archive.
      length: of the pickle in bytes, the limit of all copies.
    """

    def __init__(self, *, script: bool, length: int):
        self.stack: list[Any] = []
        self._outer: list[list[Any]] = []  # stacks below a mark
        self._memo: dict[int, Any] = {}
        self._script = script
        self._copies = length

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_integer(self, value: int) -> None:
        if value.bit_length() > LARGEST:
            raise RefusedError(f"holds an integer of {value.bit_length()} bits")
        self.push(value)

    def push_latin(self, text: str) -> None:
        """Pushes a string of Python 2, which is bytes: names are in UTF-8."""
        try:
            self.push(text if text.isascii() else text.encode("latin-1").decode())
        except UnicodeDecodeError:
            self.push(Opaque("bytes"))

    def mark(self, _: None) -> None:
        self._outer.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        """Pops all items pushed since the last mark."""
        items, self.stack = self.stack, self._outer.pop()
        return items

    def pop(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.to_mark()

    def put(self, index: int) -> None:
        self._memo[index] = self.stack[-1]

    def memoize(self, _: None) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        self.push(self._memo[index])

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise IndexError("a tuple of more than there is")
        self.stack[-count:] = [items]

    def append(self, items: list[Any]) -> None:
        container = self.stack[-1]
        if isinstance(container, list):
            container.extend(items)
        elif not isinstance(container, Opaque):
            raise TypeError(f"{type(container).__name__} is no list")

    def set_items(self, items: list[Any]) -> None:
        container = self.stack[-1]
        if len(items) % 2:
            raise ValueError("a key without a value")
        if isinstance(container, dict):
            _fill(container, zip(items[::2], items[1::2], strict=True))
        elif not isinstance(container, Opaque):
            raise TypeError(f"{type(container).__name__} is no dictionary")

    def set_item(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def find(self, module: str, name: str) -> Any:
        """The function, dtype or placeholder for a global that the pickle names."""
        known = KNOWN.get((module, name))
        if known is None and self._script:
            known = KNOWN_IN_SCRIPT.get((module, name))
        if known is not None:
            return known
        top = module.split(".")[0]
        harmful = top in HARMFUL_MODULES or (
            top in ("builtins", "__builtin__") and name in HARMFUL_BUILTINS
        )
        if harmful:
            raise RefusedError(
                f"holds {plain(f'{module}.{name}')}, which is code to run and not weights; "
                "it was not run. Do not trust this file"
            )
        if self._script and top == "__torch__":
            return _ScriptedClass(f"{module}.{name}")
        return Opaque(plain(f"{module}.{name}"))

    def find_on_stack(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a global without a name")
        self.push(self.find(module, name))

    def call(self, function: Any, arguments: Any) -> Any:
        """The result of calling a function or class that the pickle names."""
        if not isinstance(arguments, tuple):
            raise TypeError("arguments that are no tuple")
        match function:
            case _Function(call, least, most):
                if not least <= len(arguments) <= most:
                    raise TypeError(f"{len(arguments)} arguments, of {least} to {most}")
                return call(*arguments)
            case _ScriptedClass(name):
                return Scripted(name)
            case Opaque():
                return self._ordered(arguments) if function is _ORDERED_DICT else function
        raise TypeError(f"{type(function).__name__} cannot be called")

    def _ordered(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for pairs in arguments[:1]:
            if not isinstance(pairs, list | tuple):
                raise TypeError("a dictionary of no pairs")
            # A short pickle may refer to one long list many times.
            self._copies -= len(pairs)
            if self._copies < 0:
                raise RefusedError("copies one list again and again, and is no file of weights")
            if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
                raise TypeError("a dictionary of no pairs")
            _fill(result, pairs)
        return result

    def reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(self.call(function, arguments))

    def new_with_names(self, _: None) -> None:
        self.stack.pop()  # keyword arguments
        self.reduce(None)

    def build(self, _: None) -> None:
        """Sets the attributes of a scripted module; ignored for other objects."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Scripted):
            if not isinstance(state, dict):
                raise RefusedError(
                    f"holds {plain(self.stack[-1].name)}, whose attributes have no names; with "
                    f"PyTorch: {EXPORT}"
                )
            self.stack[-1].attributes = state

    def refer(self, pid: Any) -> None:
        """Pushes a storage, which is outside the pickle."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and isinstance(pid[0], str)):
            raise RefusedError(f"refers to {brief(pid)}, which is no storage")
        kind, dtype, key, _, count = pid  # the fourth is the device
        if isinstance(dtype, Opaque):
            self.push(dtype)
            return
        good = kind == "storage" and isinstance(dtype, str) and dtype in STORAGES.values()
        if not (good and isinstance(key, str) and type(count) is int and count >= 0):
            raise RefusedError(
                f"refers to a storage {brief(key)} of {brief(count)} numbers of {brief(dtype)}"
            )
        self.push(Storage(key, dtype, count))


def _fill(container: dict[Any, Any], pairs: Iterable[Any]) -> None:
    for key, value in pairs:
        # Hashing a tuple visits everything in it, which can be exponentially much.
        if not (key is None or isinstance(key, str | bytes | bool | int | float)):
            key = Opaque(type(key).__name__)
        container[key] = value


def _refuse(_: _Machine, __: Any) -> None:
    raise RefusedError(f"uses an opcode that PyTorch does not write; with PyTorch: {EXPORT}")


def _make(machine: _Machine, function: Any, arguments: list[Any]) -> None:
    machine.push(machine.call(function, tuple(arguments)))


def _make_first(machine: _Machine, _: None) -> None:
    function, *arguments = machine.to_mark()
    _make(machine, function, arguments)


def _make_dict(machine: _Machine, _: None) -> None:
    items = machine.to_mark()
    machine.push({})
    machine.set_items(items)


def _ignore(machine: _Machine, _: Any) -> None:
    pass


# The operation of each opcode, by its name in `pickletools`.
_OPCODES: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _ignore),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2"), _Machine.push_integer),
    **dict.fromkeys(("LONG", "LONG1", "LONG4"), _Machine.push_integer),
    **dict.fromkeys(("FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE"), _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _Machine.push_latin),
    **dict.fromkeys(
        ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        lambda machine, _: machine.push(Opaque("bytes")),
    ),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    # Filling a set would hash its items.
    "EMPTY_SET": lambda machine, _: machine.push(Opaque("set")),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda machine, _: machine.to_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "LIST": lambda machine, _: machine.push(machine.to_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "DICT": _make_dict,
    "FROZENSET": lambda machine, _: (machine.to_mark(), machine.push(Opaque("frozenset"))),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.to_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.to_mark()),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.to_mark()),
    "GLOBAL": lambda machine, name: machine.push(machine.find(*name.split(" ", 1))),
    "STACK_GLOBAL": _Machine.find_on_stack,
    "REDUCE": _Machine.reduce,
    # cls.__new__ in Python; here it is a call like any other.
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_with_names,
    "INST": lambda machine, name: _make(
        machine, machine.find(*name.split(" ", 1)), machine.to_mark()
    ),
    "OBJ": _make_first,
    "BUILD": _Machine.build,
    "BINPERSID": lambda machine, _: machine.refer(machine.stack.pop()),
    "PERSID": _Machine.refer,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"), _refuse),
}
