"""Writes PyTorch's zip archives without PyTorch: a pickle beside raw storages.

`tools/convert_weights.py` exports runs this way, since the originals only load .pth files.
`torch.load(path, weights_only=True)` and `torch_archive` can read them. Equal values give equal
bytes.
"""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common_jax.weights.torch_pickle import STORAGES

ROOT = "archive"  # folder in the archive; PyTorch's default name
ALIGNMENT = 64  # bytes; of storages, so that PyTorch can map them into memory

_STORAGE_OF = {
    np.dtype(getattr(ml_dtypes, dtype, dtype)): name
    for name, dtype in STORAGES.items()
    if name != "UntypedStorage"
}
Storages = dict[int, tuple[str, np.ndarray]]  # id of an array -> its name in the archive, the array
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def write(path: Path, value: Any) -> None:
    """Writes a value in the format of torch.save.

    Args:
      path: the file, which is overwritten.
      value: numpy arrays, which become tensors, and numbers, strings, True, False and None, nested
        in mappings with string keys, lists and tuples. An array in several places is stored once.

    Raises:
      TypeError: for anything else, and for dtypes that PyTorch has no storage for.
    """
    storages: Storages = {}
    pickled = b"\x80\x02" + _encode(value, storages) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, f"{ROOT}/data.pkl", pickled)
        _add(archive, f"{ROOT}/byteorder", b"little")
        for key, array in storages.values():
            little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            _add(archive, f"{ROOT}/data/{key}", little.tobytes())
        _add(archive, f"{ROOT}/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Stores a file at an offset that is a multiple of ALIGNMENT."""
    entry = zipfile.ZipInfo(name)  # dated 1980 by default, so bytes do not depend on the time
    start = archive.fp.tell() + zipfile.sizeFileHeader + len(name.encode()) + 4
    filler = -start % ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", filler) + b"Z" * filler
    archive.writestr(entry, content)


def _encode(value: Any, storages: Storages) -> bytes:
    """Opcodes that push `value` onto the stack; adds its arrays to `storages`."""
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
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case np.ndarray():
            return _tensor(value, storages)
        case tuple():
            return b"(" + b"".join(_encode(x, storages) for x in value) + b"t"
        case list():
            return b"](" + b"".join(_encode(x, storages) for x in value) + b"e"
        case Mapping() if all(isinstance(key, str) for key in value):
            pairs = (_encode(x, storages) for pair in value.items() for x in pair)
            return _ORDERED_DICT + b"(" + b"".join(pairs) + b"u"
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be in a file of tensors")


def _tensor(array: np.ndarray, storages: Storages) -> bytes:
    """Opcodes for a contiguous tensor that covers its whole storage."""
    kind = _STORAGE_OF.get(array.dtype.newbyteorder("="))
    if kind is None:
        known = sorted(str(dtype) for dtype in _STORAGE_OF)
        raise TypeError(f"an array is {array.dtype}, and PyTorch can only hold {known}")
    key, _ = storages.setdefault(id(array), (str(len(storages)), array))
    storage = _encode("storage", storages) + f"ctorch\n{kind}\n".encode()
    storage += b"".join(_encode(x, storages) for x in (key, "cpu", array.size))
    steps = tuple(int(np.prod(array.shape[i + 1 :], dtype=int)) for i in range(array.ndim))
    view = b"".join(_encode(x, storages) for x in (0, array.shape, steps, False))
    return _REBUILD + b"((" + storage + b"tQ" + view + _ORDERED_DICT + b"tR"
