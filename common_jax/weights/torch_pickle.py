"""Reads PyTorch's pickles, without importing or running anything that they name.

A pickle is a program for a stack machine. Here its opcodes only push constants, fill containers and
describe tensors; everything else becomes an `Opaque` object without behaviour. Time and memory are
linear in the length of the pickle: no value is compared, hashed, copied or printed as a whole.
"""

import dataclasses
import io
import pickle
import struct
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from common_jax.untrusted import RefusedError, brief, plain

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
# What a tensor may be besides its values.
CONJUGATED, NEGATED = "conjugated tensor", "negated tensor"
VIEWS = {"{'conj': True}": CONJUGATED, "{'neg': True}": NEGATED}
LARGEST = 512  # bits of an integer; PyTorch's own have 64, and those of numpy's generators 128
LARGEST_KEY = 64  # bits of a key; many larger integers share a hash, which slows dictionaries down
LONGEST_NAME = 400  # characters of module and class; a short pickle could copy longer ones often
MOST_AXES = 64  # of a tensor; numpy's own limit
MOST_ARGUMENTS = 8  # of the functions that rebuild tensors
# What `pickle` and this module raise for damaged pickles.
DAMAGED = (
    *(pickle.UnpicklingError, struct.error, EOFError, ArithmeticError, AttributeError),
    *(LookupError, TypeError, ValueError),
)
# Code that no weights need. It would not be run anyway, but a file that names it is malicious, and
# the user should know.
HARMFUL_MODULES = (
    *("os", "posix", "nt", "subprocess", "pty", "socket", "shutil", "sys", "runpy", "importlib"),
    *("ctypes", "webbrowser", "pip", "timeit", "code", "codeop", "bdb", "pdb", "pickle", "_pickle"),
)
HARMFUL_BUILTINS = ("eval", "exec", "compile", "open", "__import__", "breakpoint", "execfile")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """Placeholder for any other class, function or object, with its name."""

    name: str

    def append(self, _: Any) -> None:
        """Ignores items that a pickle adds, such as to a subclass of list."""

    extend = add = append


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Storage:
    """A flat array of values, stored in a file of the archive."""

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Tensor:
    """A view of a storage, with offset and strides in units of `dtype`. Only the number of axes has
    been checked: offset, shape and strides may contain anything."""

    storage: Storage
    dtype: str
    offset: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Scripted:
    """A module of a TorchScript archive with its attributes; without attributes, its class."""

    name: str
    attributes: dict[Any, Any] = dataclasses.field(default_factory=dict)


def load(content: bytes, *, script: bool) -> Any:
    """Loads a pickle's value: numbers, strings, lists, tuples and dictionaries with `Tensor`,
    `Opaque` and, if `script`, `Scripted` objects.

    Dictionary keys other than numbers and strings are replaced by `Opaque` objects.

    Raises:
      RefusedError: for a pickle that is damaged, or that names harmful code.
    """
    try:
        return _Unpickler(content, script=script).load()
    except RefusedError:
        raise
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {plain(str(error))}"
    raise RefusedError(f"has a damaged data.pkl ({reason}); copy or download it again")


def _rebuild(storage, offset, shape, strides, metadata=None, dtype=None):
    for kind in (storage, dtype):
        if isinstance(kind, Opaque):  # a dtype that is not supported
            return kind
    if not isinstance(storage, Storage):
        raise RefusedError("holds a tensor without a storage")
    if metadata:
        return Opaque(VIEWS.get(brief(metadata), f"tensor with {brief(metadata)}"))
    if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):
        raise RefusedError(f"holds a tensor of type {brief(dtype)}")
    return Tensor(storage, dtype or storage.dtype, offset, _axes(shape), _axes(strides))


# `grad` and `hooks` concern autograd only, and are ignored.
def _rebuild_v2(storage, offset, shape, strides, grad, hooks, metadata=None):
    return _rebuild(storage, offset, shape, strides, metadata)


def _rebuild_v3(storage, offset, shape, strides, grad, hooks, dtype, metadata=None):
    return _rebuild(storage, offset, shape, strides, metadata, dtype)


def _axes(sizes: Any) -> tuple[Any, ...]:
    if not isinstance(sizes, list | tuple) or len(sizes) > MOST_AXES:
        raise RefusedError(
            f"holds a tensor whose shape or strides are not a list of sizes: {brief(sizes)}"
        )
    return tuple(sizes)


def _first(value, *others):
    return value


_ORDERED_DICT = Opaque("collections.OrderedDict")  # calling it returns an empty dict
# Functions and types that tensors and the plain contents of optimizers and scalers need.
KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ORDERED_DICT,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "Size"): _axes,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{("torch.storage", name): dtype for name, dtype in STORAGES.items()},
    **{("torch", dtype): dtype for dtype in DTYPES},
}
# The same for list attributes of TorchScript modules.
KNOWN_IN_SCRIPT = {
    ("torch.jit._pickle", name): _first
    for name in (
        *("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist"),
        "restore_type_tag",
    )
}


def _bounded(load_integer: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wraps an opcode that pushes an integer with a limit on the integer's size."""

    def load_bounded(self: Any) -> None:
        load_integer(self)
        if (bits := self.stack[-1].bit_length()) > LARGEST:
            raise RefusedError(f"holds an integer of {bits} bits")

    return load_bounded


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, but without objects. It is the one written in Python, since the one
    in C allocates whatever a declared length or memo index asks for."""

    def __init__(self, content: bytes, *, script: bool):
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._script = script

    def find_class(self, module: str, name: str) -> Any:
        """The function, dtype or placeholder for a global that the pickle names."""
        if len(module) + len(name) > LONGEST_NAME:
            raise RefusedError(f"names a class {plain(module)}, whose name is too long")
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
        kind = Scripted if self._script and top == "__torch__" else Opaque
        return kind(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage | Opaque:
        """A storage, which is outside the pickle."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and isinstance(pid[0], str)):
            raise RefusedError(f"refers to {brief(pid)}, which is not a storage")
        kind, dtype, key, _, count = pid  # the fourth is the device
        if isinstance(dtype, Opaque):
            return dtype
        good = kind == "storage" and isinstance(dtype, str) and dtype in STORAGES.values()
        if not (good and isinstance(key, str) and type(count) is int and count >= 0):
            raise RefusedError(
                f"refers to a storage {brief(key)} of {brief(count)} values of {brief(dtype)}"
            )
        return Storage(key, dtype, count)

    def load_reduce(self) -> None:
        """Calls a function or class that the pickle names."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple):
            raise TypeError("arguments that are not a tuple")
        self._instantiate(function, arguments)

    def load_new_with_names(self) -> None:
        self.stack.pop()  # keyword arguments
        self.load_reduce()

    def _instantiate(self, klass: Any, args: Any) -> None:
        if klass is _ORDERED_DICT and not args:
            self.append({})
        elif isinstance(klass, Opaque):
            self.append(klass)
        elif isinstance(klass, Scripted):
            self.append(Scripted(klass.name))
        elif isinstance(klass, types.FunctionType) and len(args) <= MOST_ARGUMENTS:
            self.append(klass(*args))
        else:
            raise TypeError(f"{type(klass).__name__} cannot be called")

    def load_build(self) -> None:
        """Sets the attributes of a scripted module; does nothing for other objects."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Scripted):
            if not isinstance(state, dict):
                raise RefusedError(
                    f"holds {plain(self.stack[-1].name)}, whose attributes have no names; with "
                    f"PyTorch: {EXPORT}"
                )
            self.stack[-1].attributes = state

    def load_setitem(self) -> None:
        self._set_items([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _set_items(self, items: list[Any]) -> None:
        container = self.stack[-1]
        if isinstance(container, dict):
            _fill(container, zip(items[::2], items[1::2], strict=True))
        elif not isinstance(container, Opaque):
            raise TypeError(f"{type(container).__name__} is not a dictionary")

    def load_set(self) -> None:
        self.append(Opaque("set"))  # filling one would hash its items

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Opaque("frozenset"))

    def refuse(self) -> None:
        raise RefusedError(f"uses an opcode that PyTorch does not write; with PyTorch: {EXPORT}")

    dispatch = pickle._Unpickler.dispatch | {
        # NEWOBJ is cls.__new__ in Python; here it is a call like any other.
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_new_with_names,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.EMPTY_SET[0]: load_set,
        pickle.FROZENSET[0]: load_frozenset,
        # Read as bytes: a bytearray would be allocated before its bytes are read.
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,
        pickle.INT[0]: _bounded(pickle._Unpickler.load_int),
        pickle.LONG[0]: _bounded(pickle._Unpickler.load_long),
        pickle.LONG1[0]: _bounded(pickle._Unpickler.load_long1),
        pickle.LONG4[0]: _bounded(pickle._Unpickler.load_long4),
        **dict.fromkeys(pickle.EXT1 + pickle.EXT2 + pickle.EXT4, refuse),
        # PUT, used only in protocol 0, may have an index of any size.
        **dict.fromkeys(pickle.PUT + pickle.NEXT_BUFFER + pickle.READONLY_BUFFER, refuse),
    }


def _fill(container: dict[Any, Any], pairs: Iterable[Any]) -> None:
    for key, value in pairs:
        # Hashing a tuple visits everything in it, which can take exponential time.
        plain_key = key is None or isinstance(key, str | bytes | int | float)
        if not plain_key or (isinstance(key, int) and key.bit_length() > LARGEST_KEY):
            key = Opaque(type(key).__name__)
        container[key] = value
