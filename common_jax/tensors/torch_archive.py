"""PyTorch's zip archives without PyTorch: a pickle beside raw storages.

The pickle may rebuild tensors and hold plain containers; whatever else it names is refused, never
imported. Storages are read only for tensors that are returned, so that an optimizer's state in the
same file costs nothing.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common_jax.tensors.naming import Chosen, choose

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
LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # the old format's magic number, pickled
EXPORT = "torch.save(model.state_dict(), NEW_FILE)"
DAMAGED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
DAMAGED_ZIP = (EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


class _RefusedError(ValueError):
    """What is wrong with a file, in words for its user."""


def read(path: Path, weights: str = "") -> Chosen:
    """The tensors of a file: of a state dict, of a checkpoint that holds one under a key, or of a
    TorchScript archive; each in the type that it is stored in.

    Args:
      path: of the file.
      weights: key of the state dict that is meant, see `naming.choose`.

    Raises:
      ValueError: for a file that is cut off, of another format, that holds anything but tensors
        and plain containers, or several state dicts of which none is chosen; nothing in it is run.
    """
    return _open(path, lambda archive: _read_archive(archive, weights))


def module_classes(path: Path) -> frozenset[str]:
    """Names of the classes that a TorchScript archive's modules are of; none of any other file.

    Raises:
      ValueError: as `read`.
    """

    def find(archive: zipfile.ZipFile) -> frozenset[str]:
        top, _, script = _load(archive)
        return _classes(top) if script else frozenset()

    return _open(path, find)


def read_plain(path: Path) -> dict[str, Any]:
    """The numbers, texts and lists of these that a checkpoint holds beside its tensors, by their
    keys at the top; raises ValueError as `read`."""

    def find(archive: zipfile.ZipFile) -> dict[str, Any]:
        top, _, _ = _load(archive)
        return {k: v for k, v in top.items() if _plain(v)} if isinstance(top, dict) else {}

    return _open(path, find)


def _open(path: Path, use: Callable[[zipfile.ZipFile], Any]) -> Any:
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
    if start.startswith(LEGACY):
        raise ValueError(
            f"{path} is in PyTorch's format of before 1.6, which is not read; with PyTorch: "
            "torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
        )
    if not start.startswith(b"PK"):
        raise ValueError(
            f"{path} is no zip archive of PyTorch, it starts with {start[:8]!r}; with PyTorch: "
            f"{EXPORT}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return use(archive)
    except _RefusedError as refused:
        raise ValueError(f"{path} {refused}") from None
    except DAMAGED_ZIP as error:
        raise ValueError(
            f"{path} is damaged or cut off ({error}); copy or download it again"
        ) from None


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Numbers in a row, in a file of the archive."""

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage; numbers are counted in `dtype`."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for a number or a setting that no tensor is made of; keeps nothing."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


class _Scripted:
    """A module of a TorchScript archive, as its attributes."""

    qualified = ""


def _rebuild(storage, offset, shape, strides, grad=None, hooks=None, metadata=None, dtype=None):
    if not isinstance(storage, _Storage):
        raise _RefusedError("holds a tensor without a storage")
    if metadata:
        raise _RefusedError(f"holds a tensor that is more than its numbers: {metadata}")
    return _Tensor(storage, dtype or storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_untyped(storage, offset, shape, strides, grad, hooks, dtype, metadata=None):
    return _rebuild(storage, offset, shape, strides, grad, hooks, metadata, dtype)


def _first(value, *others):
    return value


# What a pickle may name: how tensors, and the plain contents of optimizers and scalers, are made.
ADMITTED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "Size"): tuple,
    ("torch", "device"): _Inert,
    ("numpy", "dtype"): _Inert,
    ("numpy.core.multiarray", "scalar"): _Inert,
    ("numpy._core.multiarray", "scalar"): _Inert,
    ("_codecs", "encode"): _Inert,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{("torch.storage", name): dtype for name, dtype in STORAGES.items()},
    **{("torch", dtype): dtype for dtype in DTYPES},
}
CALLED = (_Inert, _first, _rebuild, _rebuild_untyped, tuple)
# The same in TorchScript, for attributes that are lists.
ADMITTED_IN_SCRIPT = {
    ("torch.jit._pickle", name): _first
    for name in (
        *("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist"),
        "restore_type_tag",
    )
}


class _Unpickler(pickle.Unpickler):
    """Makes of a pickle tensors and plain containers, or raises."""

    def __init__(self, file, script: bool):
        super().__init__(file, encoding="utf-8")
        self._script = script

    def find_class(self, module: str, name: str) -> Any:
        known = ADMITTED | ADMITTED_IN_SCRIPT if self._script else ADMITTED
        if (module, name) in known:
            value = known[module, name]
            # A function of its own for each pickle, which can then change nothing that lasts.
            return (lambda *a: value(*a)) if value in CALLED else value
        if self._script and module.split(".")[0] == "__torch__":
            return type(name, (_Scripted,), {"qualified": f"{module}.{name}"})
        raise _RefusedError(
            f"holds {module}.{name}, which is neither a tensor nor a plain container, and which is "
            f"not run; if you trust the file, with PyTorch: {EXPORT}"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise _RefusedError(f"refers to {pid!r}, which is no storage")
        _, dtype, key, _, count = pid
        if dtype not in STORAGES.values() or not _counts(count):
            raise _RefusedError(f"refers to a storage {key!r} of {count!r} numbers of {dtype!r}")
        return _Storage(str(key), dtype, count)


def _read_archive(archive: zipfile.ZipFile, weights: str) -> Chosen:
    top, root, script = _load(archive)
    with _blamed():
        walked = dict(_walk(top, _declared(archive, root), "")) if script else {}
    chosen = Chosen(walked) if script else _state_dict(top, weights)
    if not chosen.tensors:
        raise _RefusedError(f"holds no tensors; with PyTorch: {EXPORT}")
    read = functools.cache(lambda storage: _read_storage(archive, root, storage))
    arrays = {name: _array(name, x, read(x.storage)) for name, x in chosen.tensors.items()}
    return Chosen(arrays, chosen.notes)


def _load(archive: zipfile.ZipFile) -> tuple[Any, str, bool]:
    """What is pickled, the folder in the archive, and whether it is TorchScript."""
    names = archive.namelist()
    roots = [n.removesuffix("data.pkl") for n in names if re.fullmatch("([^/]+/)?data.pkl", n)]
    if len(roots) != 1:
        raise _RefusedError(
            f"is a zip archive without PyTorch's data.pkl; it holds {names[:5]}. With PyTorch: "
            f"{EXPORT}"
        )
    root = roots[0]
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder").strip() != b"little":
        raise _RefusedError(f"has numbers in big-endian order; with PyTorch elsewhere: {EXPORT}")
    script = f"{root}constants.pkl" in names
    content = io.BytesIO(archive.read(f"{root}data.pkl"))
    with _blamed():
        return _Unpickler(content, script).load(), root, script


@contextlib.contextmanager
def _blamed() -> Iterator[None]:
    """Says of whatever goes wrong within that data.pkl is damaged."""
    try:
        yield
    except _RefusedError:
        raise
    except DAMAGED as error:
        raise _RefusedError(
            f"has a damaged data.pkl ({error!r}); copy or download it again"
        ) from None


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, bool | int | float | str)


def _state_dict(top: Any, weights: str) -> Chosen:
    """One dictionary of tensors in what a file holds."""
    try:
        return choose(top, lambda value: isinstance(value, _Tensor), weights)
    except ValueError as error:
        raise _RefusedError(f"{error}; with PyTorch: {EXPORT}") from None


def _classes(top: Any) -> frozenset[str]:
    """Names of the classes of a scripted module and of those in it."""
    seen, left, names = set(), [top], set()
    while left:
        module = left.pop()
        if isinstance(module, _Scripted) and id(module) not in seen:
            seen.add(id(module))
            names.add(type(module).__name__)
            left += vars(module).values()
    return frozenset(names)


def _walk(module: Any, declared: Mapping[str, set[str]], path: str) -> Iterator:
    """Parameters and buffers of a scripted module, as its `state_dict` names them."""
    if not isinstance(module, _Scripted):
        raise _RefusedError(f"is TorchScript without a module; with PyTorch: {EXPORT}")
    own = declared.get(type(module).qualified)
    for name, value in vars(module).items():
        if isinstance(value, _Scripted):
            yield from _walk(value, declared, f"{path}{name}.")
        elif isinstance(value, _Tensor) and (own is None or name in own):
            yield path + name, value


def _declared(archive: zipfile.ZipFile, root: str) -> dict[str, set[str]]:
    """Which attributes of each scripted class are parameters and buffers; others may be tensors
    too, such as a mask."""
    heading = re.compile(
        r"^class (\w+)\(.*\):\n  __parameters__ = \[(.*)\]\n  __buffers__ = \[(.*)\]", re.MULTILINE
    )
    found = {}
    for name in archive.namelist():
        if match := re.fullmatch(re.escape(root) + r"code/(.+)\.py", name):
            module = match[1].replace("/", ".")
            for kind, parameters, buffers in heading.findall(archive.read(name).decode()):
                attributes = re.findall(r'"([^"]+)"', parameters + buffers)
                found[f"{module}.{kind}"] = set(attributes)
    return found


def _read_storage(archive: zipfile.ZipFile, root: str, storage: _Storage) -> bytes:
    name = f"{root}data/{storage.key}"
    if name not in archive.NameToInfo:
        raise _RefusedError(f"lacks {name}, a tensor's numbers; copy or download it again")
    raw, size = archive.read(name), storage.count * _dtype(storage.dtype).itemsize
    if len(raw) != size:
        raise _RefusedError(
            f"has {len(raw)} bytes in {name}, which should be {size}; copy or download it again"
        )
    return raw


def _array(name: str, tensor: _Tensor, raw: bytes) -> np.ndarray:
    dtype = _dtype(tensor.dtype)
    numbers = np.frombuffer(raw, dtype, len(raw) // dtype.itemsize)
    shape, strides = tensor.shape, tensor.strides
    if not (len(shape) == len(strides) and _counts(tensor.offset, *shape, *strides)):
        raise _RefusedError(f"gives {name} the shape {shape} with strides {strides}")
    if 0 in shape:
        return np.empty(shape, dtype)
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if tensor.offset + last >= numbers.size:
        raise _RefusedError(f"has {numbers.size} numbers for {name} {shape}, which is too few")
    steps = [stride * dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], shape, steps, writeable=False)


def _counts(*values: Any) -> bool:
    return all(isinstance(value, int) and value >= 0 for value in values)


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
