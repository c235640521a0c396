"""Reads PyTorch's zip archives without PyTorch: a pickle beside raw storages.

The pickle may rebuild tensors and plain containers; anything else that it names becomes a
placeholder and is never imported (`torch_pickle`). Only the storages of returned tensors are read,
so an optimizer's state in the same file costs nothing.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common_jax.untrusted import (
    MOST_BYTES,
    Archive,
    RefusedError,
    brief,
    full_size,
    open_archive,
    plain,
)
from common_jax.weights import torch_pickle
from common_jax.weights.naming import Chosen, choose, require_name, require_plain
from common_jax.weights.torch_pickle import EXPORT, Scripted, Tensor

LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # pickled magic number of the old format
LARGEST_PICKLE = 1 << 26  # bytes; published weights have less than 2^22
DEEPEST = 64  # nesting of modules, and of lists
# Limit on a script's modules and tensors, and on list items, counting shared ones every time.
MOST_VISITS = 100_000
# Tensors may repeat and share values, as with `expand`. Limit on their total size over the file's.
MOST_REPEATED = 64


def read(path: Path, weights: str = "") -> Chosen:
    """Reads the tensors of a state dict, of a checkpoint with one under a key, or of a TorchScript
    archive, with their stored dtypes. Runs no code in the file.

    Args:
      path: the file.
      weights: key of the state dict to read, see `naming.choose`.

    Raises ValueError as `common_jax.weights.read_weights`.
    """
    with _open(path) as archive:
        top, root, script = _load(archive)
        scripted = Chosen(dict(_walk(top, _declared(archive, root)))) if script else None
        chosen = scripted or choose(top, weights)
        parts = chosen.tensors
        if not parts:
            raise RefusedError(f"holds no tensors; with PyTorch: {EXPORT}")
        _require_sizes(archive, root, parts)
        numbers: dict[str, bytearray] = {}
        for tensor in parts.values():
            key = tensor.storage.key
            if key not in numbers:
                entry = archive.entries[f"{root}data/{key}"]
                numbers[key] = archive.read(entry.filename, limit=entry.file_size)
        arrays = {name: _array(x, numbers[x.storage.key]) for name, x in parts.items()}
        return Chosen(arrays, chosen.notes)


def module_classes(path: Path) -> frozenset[str]:
    """Class names of the modules in a TorchScript archive; empty for other archives. Raises
    ValueError as `read`."""
    with _open(path) as archive:
        top, _, script = _load(archive)
        return _classes(top) if script else frozenset()


def read_plain(path: Path) -> dict[str, Any]:
    """The numbers, strings and lists of these at the top level of a checkpoint, by key. Raises
    ValueError as `read`."""
    with _open(path) as archive:
        top, _, _ = _load(archive)
        entries = top.items() if isinstance(top, dict) else ()
        return {k: v for k, v in entries if isinstance(k, str) and _is_plain(v)}


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Archive]:
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
    if start.startswith(LEGACY):
        raise ValueError(
            f"{path} is in PyTorch's format from before 1.6, which is not supported; convert it "
            "with PyTorch: torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
        )
    if not start.startswith(b"PK"):
        raise ValueError(
            f"{path} is not a zip archive of PyTorch, it starts with {start[:8]!r}; with PyTorch: "
            f"{EXPORT}"
        )
    try:
        with open_archive(path) as archive:
            yield archive
    except RefusedError as refused:
        raise ValueError(f"{path} {refused}") from None


def _load(archive: Archive) -> tuple[Any, str, bool]:
    """Returns the pickled value, its folder in the archive, and whether this is TorchScript."""
    names = archive.entries
    roots = [n.removesuffix("data.pkl") for n in names if re.fullmatch("([^/]+/)?data.pkl", n)]
    if len(roots) != 1:
        raise RefusedError(
            f"is a zip archive without PyTorch's data.pkl; it holds {brief([*names][:5])}. With "
            f"PyTorch: {EXPORT}"
        )
    root = roots[0]
    # The presence of these files decides how the rest is read, so check that they are intact.
    others = [name for name in names if not name.startswith((f"{root}data/", f"{root}data.pkl"))]
    archive.require_room(others)  # TorchScript's code is text, and compressed
    for name in others:
        archive.read(name, limit=archive.room)
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder").strip() != b"little":
        raise RefusedError(f"is big-endian; with PyTorch on a little-endian machine: {EXPORT}")
    script = f"{root}constants.pkl" in names
    content = archive.read(f"{root}data.pkl", limit=min(archive.size, LARGEST_PICKLE))
    return torch_pickle.load(bytes(content), script=script), root, script


def _is_plain(value: Any) -> bool:
    """True for numbers, strings, and lists of these. False for lists with too many items, counting
    shared ones every time, or nested too deep, such as one that contains itself."""
    visits, waiting = 0, [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, list | tuple):
            if (visits := visits + len(part)) > MOST_VISITS or depth > DEEPEST:
                return False
            waiting += [(inner, depth + 1) for inner in part]
        elif not isinstance(part, bool | int | float | str):
            return False
    return True


def _classes(top: Any) -> frozenset[str]:
    """Class names of a scripted module and its submodules."""
    visited, waiting, names = set(), [top], set()
    while waiting:
        module = waiting.pop()
        if isinstance(module, Scripted) and id(module) not in visited:
            visited.add(id(module))
            names.add(module.name.rpartition(".")[2])
            waiting += module.attributes.values()
    return frozenset(names)


def _walk(top: Any, declared: Mapping[str, set[str]]) -> Iterator[tuple[str, Tensor]]:
    """Yields parameters and buffers of a scripted module, by their names in its `state_dict`."""
    if not isinstance(top, Scripted):
        raise RefusedError(f"is TorchScript without a module; with PyTorch: {EXPORT}")
    visits, waiting = 0, [("", top, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if (visits := visits + 1) > MOST_VISITS or depth > DEEPEST:
            raise RefusedError(
                f"has modules that nest deeper than {DEEPEST}, or more than {MOST_VISITS} of them"
            )
        require_name(path)
        if isinstance(value, Tensor):
            yield path, value
            continue
        own = declared.get(value.name)
        for name in own or ():
            require_plain(f"{path}.{name}" if path else name, value.attributes.get(name))
        inner = [
            (f"{path}.{name}" if path else name, part, depth + 1)
            for name, part in value.attributes.items()
            if isinstance(name, str)
            and (
                isinstance(part, Scripted)
                or (isinstance(part, Tensor) and (own is None or name in own))
            )
        ]
        if len(waiting) + len(inner) > MOST_VISITS:
            raise RefusedError(f"has more than {MOST_VISITS} modules and tensors")
        waiting += reversed(inner)


def _declared(archive: Archive, root: str) -> dict[str, set[str]]:
    """The attributes that each scripted class declares as parameters or buffers, since other
    attributes, such as a mask, may be tensors too."""
    heading = re.compile(
        r"^class (\w+)\(.*\):\n  __parameters__ = \[(.*)\]\n  __buffers__ = \[(.*)\]", re.MULTILINE
    )
    pattern = re.escape(root) + r"code/(.+)\.py"
    modules = {name: match[1] for name in archive.entries if (match := re.fullmatch(pattern, name))}
    archive.require_room([*modules])
    by_class = {}
    for name, module in modules.items():
        code = archive.read(name, limit=archive.room).decode(errors="replace")
        for kind, parameters, buffers in heading.findall(code):
            attributes = re.findall(r'"([^"]+)"', parameters + buffers)
            by_class[f"{module.replace('/', '.')}.{kind}"] = set(attributes)
    return by_class


def _require_sizes(archive: Archive, root: str, parts: Mapping[str, Tensor]) -> None:
    """Raises RefusedError if tensors do not fit the storages listed in the archive's directory,
    before any storage is read."""
    storages = {tensor.storage.key: tensor.storage for tensor in parts.values()}
    for key in storages:
        if f"{root}data/{key}" not in archive.entries:
            raise RefusedError(
                f"lacks {plain(f'{root}data/{key}')}, a tensor's data; copy or download it again"
            )
    archive.require_room([f"{root}data/{key}" for key in storages])
    total = 0
    for name, tensor in parts.items():
        storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
        entry = archive.entries[f"{root}data/{storage.key}"]
        size = storage.count * _dtype(storage.dtype).itemsize
        if entry.file_size != size:
            raise RefusedError(
                f"has {entry.file_size} bytes in {plain(entry.filename)}, which should be {size}; "
                "copy or download it again"
            )
        counts = (tensor.offset, *shape, *strides)
        are_counts = all(type(count) is int and 0 <= count < MOST_BYTES for count in counts)
        if len(shape) != len(strides) or not are_counts:
            raise RefusedError(
                f"gives {plain(name)} the shape {brief(shape)} with strides {brief(strides)} at "
                f"{brief(tensor.offset)}"
            )
        count = size // _dtype(tensor.dtype).itemsize
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and tensor.offset + last >= count:
            raise RefusedError(f"has too few values for {plain(name)} {brief(shape)}, {count}")
        largest = full_size(shape, _dtype(tensor.dtype).itemsize)
        total += 0 if 0 in shape else largest
        if largest >= MOST_BYTES or total > MOST_REPEATED * archive.size:
            raise RefusedError(
                f"gives {plain(name)} the shape {brief(shape)}, more than {MOST_REPEATED} times "
                "what the file holds"
            )


def _array(tensor: Tensor, raw: bytearray) -> np.ndarray:
    """The tensor as a view of its storage; `_require_sizes` has checked the bounds."""
    dtype, shape = _dtype(tensor.dtype), tensor.shape
    if 0 in shape:
        return np.empty(shape, dtype)
    numbers = np.frombuffer(raw, dtype, len(raw) // dtype.itemsize)[tensor.offset :]
    # The stride of an axis of length 1 has no effect, and the file may give any value.
    pairs = zip(shape, tensor.strides, strict=True)
    steps = [stride * dtype.itemsize if n > 1 else 0 for n, stride in pairs]
    return np.lib.stride_tricks.as_strided(numbers, shape, steps, writeable=False)


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
