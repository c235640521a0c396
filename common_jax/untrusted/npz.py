"""Reads untrusted .npz files of numpy; declared types and shapes are checked against the bytes."""

import math
import re
import sys
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from common_jax.untrusted.refusal import RefusedError, brief
from common_jax.untrusted.zips import open_archive

MOST_BYTES = 1 << 62  # limit on an array's size, which numpy counts in 64 bits
MAGIC = b"\x93NUMPY\x01\x00"
# The only form in which numpy writes the header of plain numbers and strings. Unlike parsing a
# literal, a pattern evaluates nothing, and it admits no structures, objects or dates.
HEADER = re.compile(
    r"\{'descr': '(?P<dtype>[<>|][?biufcSU]\d{1,9})', 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>(\d{1,18}, ?)*(\d{1,18})?)\), \} *\n"
)


def read_npz(
    path: epath.PathLike, names: Iterable[str], *, mapped: bool = False
) -> dict[str, np.ndarray]:
    """Reads the arrays of these names from a `.npz` file that `numpy.savez` wrote.

    Args:
      path: the file.
      names: names of the arrays.
      mapped: whether to map the arrays into memory; the file may then be replaced, but not changed.

    Raises:
      ValueError: if the file is damaged, lacks an array, or has anything but plain numbers and
        strings; names the file.
      OSError: if it cannot be read.
    """
    try:
        with open_archive(path) as archive:
            read = archive.view if mapped else archive.read
            return {name: _array(name, read(f"{name}.npy")) for name in names}
    except RefusedError as refused:
        raise ValueError(f"{path} {refused}") from None


def full_size(shape: Sequence[int], itemsize: int) -> int:
    """The bytes of an array, with axes of length 0 counted as 1; a 0 would hide any length of the
    other axes."""
    return math.prod(max(axis, 1) for axis in shape) * itemsize


def _array(name: str, content: bytearray | memoryview) -> np.ndarray:
    start = len(MAGIC) + 2
    end = start + int.from_bytes(content[len(MAGIC) : start], "little")
    match = HEADER.fullmatch(str(content[start:end], "latin-1"))
    if content[: len(MAGIC)] != MAGIC or match is None:
        raise RefusedError(f"holds {brief(name)} in a form that numpy does not write")
    try:
        dtype = np.dtype(match["dtype"])
    except TypeError:
        raise RefusedError(f"holds {brief(name)} of type {match['dtype']!r}") from None
    shape = tuple(int(size) for size in re.findall(r"\d+", match["shape"]))
    size = math.prod(shape) * dtype.itemsize
    largest = full_size(shape, dtype.itemsize)
    # Items of zero bytes would allow axes of any length.
    if size != len(content) - end or largest >= MOST_BYTES or len(shape) > 32 or not dtype.itemsize:
        raise RefusedError(
            f"declares {brief(name)} as {dtype} {brief(shape)}, which does not fit its "
            f"{len(content) - end} bytes"
        )
    if dtype.kind == "U":
        codes = np.frombuffer(content, np.dtype("u4").newbyteorder(dtype.byteorder), offset=end)
        if (codes > sys.maxunicode).any():  # numpy would make invalid Python strings from them
            raise RefusedError(f"holds {brief(name)} with characters that do not exist")
    array = np.frombuffer(content, dtype, math.prod(shape), end)
    return array.reshape(shape, order="F" if match["fortran"] == "True" else "C")
