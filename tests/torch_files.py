"""PyTorch's zip archives written by hand, so that reading them is tested without PyTorch.

A pickle is assembled from opcodes, so that what it refers to need not exist here.
"""

import dataclasses
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

KINDS = {
    np.dtype(dtype): f"{name}Storage"
    for dtype, name in (
        (ml_dtypes.bfloat16, "BFloat16"),
        ("bool", "Bool"),
        ("float16", "Half"),
        ("float32", "Float"),
        ("float64", "Double"),
        ("int64", "Long"),
        ("uint8", "Byte"),
    )
}


@dataclasses.dataclass(frozen=True)
class Global:
    """Something that a pickle refers to by module and name."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """function(*arguments)."""

    function: Any
    arguments: tuple


@dataclasses.dataclass(frozen=True)
class New:
    """An object of a class, with attributes."""

    cls: Any
    state: dict


@dataclasses.dataclass(frozen=True)
class Persistent:
    """An object outside the pickle."""

    key: Any


@dataclasses.dataclass(frozen=True)
class Raw:
    """Raw opcodes."""

    opcodes: bytes


def encode(value: Any) -> bytes:
    """Opcodes that put `value` on the stack."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"\x8a\x08" + struct.pack("<q", value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(x) for pair in value.items() for x in pair) + b"u"
        case Global():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return encode(value.function) + encode(value.arguments) + b"R"
        case New():
            return encode(value.cls) + b")\x81" + encode(value.state) + b"b"
        case Persistent():
            return encode(value.key) + b"Q"
        case Raw():
            return value.opcodes
    raise TypeError(type(value))


def storage(kind: str, key: str, count: int) -> Persistent:
    """A reference to the numbers in data/KEY."""
    return Persistent(("storage", Global("torch", kind), key, "cpu", count))


def tensor(held: Any, shape: tuple, strides: tuple, *, offset: int = 0, more: tuple = ()) -> Call:
    """A view of a storage; `more` holds further arguments of PyTorch's function."""
    hooks = Call(Global("collections", "OrderedDict"), ())
    arguments = (held, offset, shape, strides, False, hooks, *more)
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)


def steps(shape: tuple) -> tuple:
    """Strides of a row-major array."""
    return tuple(int(np.prod(shape[i + 1 :], dtype=int)) for i in range(len(shape)))


def write_archive(path, value: Any, storages: dict, *, extra: dict | None = None) -> None:
    """Writes a zip archive with a pickled value, and storages by key."""
    files = {"data.pkl": b"\x80\x02" + encode(value) + b".", "version": b"3\n"}
    files |= {f"data/{key}": np.asarray(array).tobytes() for key, array in storages.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | (extra or {})).items():
            archive.writestr(f"{path.stem}/{name}", content)


def state_dict(tensors: dict, storages: dict) -> Call | dict:
    """A pickled dictionary of tensors for the arrays; their numbers go to `storages`, which equal
    objects share."""
    entries, known = {}, {}
    for name, array in tensors.items():
        if id(array) not in known:
            known[id(array)] = key = str(len(storages))
            storages[key] = np.ascontiguousarray(array)
        key = known[id(array)]
        held = storage(KINDS[array.dtype], key, array.size)
        entries[name] = tensor(held, array.shape, steps(array.shape))
    return entries


def save(path, tensors: dict) -> None:
    """A bare state dict, as torch.save writes it."""
    storages = {}
    write_archive(path, state_dict(tensors, storages), storages)
