"""Reads safetensors files; their header is checked against the file before tensors are allocated.

The library's own reader lacks numpy types of fewer than 16 bits.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common_jax.untrusted import (
    MOST_AXES,
    MOST_BYTES,
    RefusedError,
    are_counts,
    brief,
    full_size,
    parse_json,
    plain,
)

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
LENGTH = 8  # bytes of the header's length
LONGEST_HEADER = 100_000_000  # bytes, as the format allows


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor in the header; `begin` and `end` count bytes after the header."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name, in the order of the header.

    Raises:
      ValueError: naming the file, if it is damaged, truncated, or has a dtype that numpy lacks.
      OSError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH), "little")
            if size < LENGTH or length > min(size - LENGTH, LONGEST_HEADER):
                raise _damaged(f"a header of {length} bytes is no part of a file of {size}")
            entries = _entries(file.read(length))
            _require_whole(entries, size - LENGTH - length)
            arrays = {}
            for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
                raw = bytearray(entry.end - entry.begin)
                if file.readinto(raw) != len(raw):
                    raise _damaged(f"the numbers of {plain(entry.name)} are missing")
                arrays[entry.name] = np.frombuffer(raw, entry.dtype).reshape(entry.shape)
            return {entry.name: arrays[entry.name] for entry in entries}
    except RefusedError as refused:
        raise ValueError(f"{path} {refused}") from None


def _entries(header: bytes) -> list[_Entry]:
    try:
        content = parse_json(header)
    except RefusedError as refused:
        raise _damaged(f"its header {refused}") from None
    if not isinstance(content, dict):
        raise _damaged(f"its header is {brief(content)}, where an object is expected")
    metadata = content.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(x, str) for x in metadata.values())):
        raise _damaged(f"its __metadata__ is {brief(metadata)}, where texts are expected")
    return [_entry(name, value) for name, value in content.items()]


def _entry(name: str, value: Any) -> _Entry:
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise _damaged(f"its header has the name {brief(name)}, with half a character")
    match value:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [begin, end], **rest} if (
            not rest and are_counts(begin, end, *shape) and len(shape) <= MOST_AXES
        ):
            pass
        case _:
            raise _damaged(f"its header gives {plain(name)} as {brief(value)}")
    dtype = DTYPES.get(kind)
    if dtype is None:
        raise RefusedError(
            f"holds {plain(name)} in the type {plain(kind)}, which is not read, only "
            f"{', '.join(DTYPES)}; save it in one of these"
        )
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size or full_size(shape, dtype.itemsize) >= MOST_BYTES:
        raise _damaged(f"{plain(name)} has {end - begin} bytes for {kind} {brief(shape)}")
    return _Entry(name, dtype, tuple(shape), begin, end)


def _require_whole(entries: list[_Entry], size: int) -> None:
    """Raises RefusedError unless the numbers fill the file without gaps or overlaps."""
    place = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != place:
            raise _damaged(
                f"the numbers of {plain(entry.name)} begin at {entry.begin}, not {place}"
            )
        place = entry.end
    if place != size:
        raise _damaged(f"it has {size} bytes of numbers, and its header {place}")


def _damaged(reason: str) -> RefusedError:
    return RefusedError(f"is damaged or cut off ({reason}); copy or download it again")
